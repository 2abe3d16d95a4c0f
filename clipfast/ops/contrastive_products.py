"""Matrix products of the losses' tiles: of 16-bit features by a card's tensor cores, with sums and results in float32.

``torch.mm(out_dtype=torch.float32)`` takes 16-bit factors and rounds nothing, which the CPU has no such operator for.
Features in float32 would be multiplied at a twelfth of the rate. The other factor of a gradient is in float32; it goes
as two terms, its 16-bit value and what that leaves out, which together are exact to 2^-17.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# what a float16 factor is scaled to at most: far from the largest number, and as far as can be from the smallest
_MOST = 2.0**12


@functools.cache
def _has_mixed_products() -> bool:
    return torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()


def takes(features: Tensor) -> bool:
    """Return whether features are multiplied as they are, and need no copy in the precision of sums."""
    return features.is_cuda and features.dtype in (torch.float16, torch.bfloat16) and _has_mixed_products()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in float32, of two matrices in one dtype of 16 bits."""
    return torch.mm(a, b, out_dtype=torch.float32)


def scale_of(features: Tensor, weights: Sequence[Tensor], factors: Sequence[Tensor] = ()) -> Tensor | None:
    """Return what :func:`weighted` gets as ``scale``: none where ``features`` have float32's exponents.

    Args:
        features: A factor of the products.
        weights: Whose largest values, added up, bound half of the other factor's entries.
        factors: What those entries are multiplied by.
    """
    if features.dtype != torch.float16:
        return None
    largest = sum(weight.abs().amax() for weight in weights)
    for factor in factors:
        largest = largest * factor.abs().amax()
    largest = largest.clamp(min=torch.finfo(torch.float32).tiny)
    # a power of two changes no digit
    return torch.exp2((_MOST / largest).clamp(max=2.0**100).log2().floor())


def weighted(g: Tensor, features: Tensor, scale: Tensor | None) -> Tensor:
    """Return ``g @ features`` in float32, of float32 entries and features in 16 bits.

    Args:
        g: ``[M, N]``.
        features: ``[N, D]``.
        scale: As from :func:`scale_of`.
    """
    if scale is not None:
        g = g * scale
    high = g.to(features.dtype)
    low = (g - high).to(features.dtype)
    out = multiply(high, features).add_(multiply(low, features))
    return out if scale is None else out.div_(scale)
