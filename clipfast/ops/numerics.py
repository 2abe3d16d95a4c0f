"""The bound on what a fast path may be off by (docs/numerics.md), for checks that run on a user's machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def worst(
    found: Sequence[Tensor],
    reference: Sequence[Tensor],
    oracle: Sequence[Tensor],
    scales: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Return the error and the bound of the tensor that comes closest to its bound, or passes it by the most.

    Args:
        found: What a fast path gave.
        reference: The same by plain PyTorch in the same dtypes.
        oracle: The same in float64.
        scales: The natural scales of the sums behind each; max|oracle| by default.

    Returns:
        ``(error, allowed)``: at most twice the reference's error and two units of rounding are allowed. NaN in what
        was found is an infinite error.
    """
    most, error, allowed = -1.0, 0.0, 0.0
    for i, (f, r, o) in enumerate(zip(found, reference, oracle, strict=True)):
        o = o.double()
        scale = scales[i] if scales is not None else float(o.abs().max())
        bound = 2 * float((r.double() - o).abs().max()) + 2 * torch.finfo(f.dtype).eps * scale
        off = float((f.double() - o).abs().max())
        off = off if off == off else float("inf")
        ratio = off / bound if bound else (float("inf") if off else 0.0)
        if ratio > most:
            most, error, allowed = ratio, off, bound
    return error, allowed
