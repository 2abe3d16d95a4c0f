"""16-bit features for the losses' tiles under autocast, whatever their size: rows times a power of two each.

Autocast multiplies in 16 bits, and open_clip's normalisation gives float32 there. In float32 features would miss the
tensor cores, twelve times as fast. Of the two formats, float16 keeps eleven bits and bfloat16 eight: at a scale of 100
gradients of unit features are off by 0.001 and 0.008 of their size, so float16 is taken also where autocast's dtype is
bfloat16. What it lacks is range. Every row is therefore divided by the power of two that brings its largest entry to 1
… 2; the powers go to the kernels as factors of the logits, and come off the gradients. No digit is lost by that, and
nothing has to be known of the features: nobody waits for the device.

Gradients come back in float32, as the features came. Logits and sums are float32 as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# whose matrix products are so much faster in 16 bits
_DEVICES = ("cuda",)
# under this a row is as good as zero: its power of two still has an inverse
_LEAST = 2.0**-100


def tile_dtype(features: Tensor) -> torch.dtype | None:
    """Return the 16-bit dtype that tiles hold features in, or None where they hold them as they came."""
    device = features.device.type
    if device not in _DEVICES or features.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return None
    return torch.float16 if torch.get_autocast_dtype(device) in (torch.float16, torch.bfloat16) else None


def narrowed(features: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return float32 features ``[B, D]`` in 16 bits, and what to multiply rows by, ``[B]``: powers of two."""
    largest = torch.linalg.vector_norm(features, torch.inf, dim=1)
    powers = largest.clamp_min(_LEAST).log2().floor().exp2()
    return (features / powers[:, None]).to(dtype), powers


def widened(features: Tensor, powers: Tensor) -> Tensor:
    """Undo :func:`narrowed`, but for what was rounded."""
    return features.to(powers.dtype) * powers[:, None]


def rounded(features: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 features with the values that tiles of ``dtype`` hold; gradients pass as they are."""
    return _Rounded.apply(features, dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, dtype: torch.dtype) -> Tensor:
        return widened(*narrowed(features, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
