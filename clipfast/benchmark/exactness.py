"""What is timed must be right: every side's results beside a float64 oracle, before any clock runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Errors:
    """How far results are from the oracle, the furthest of them.

    Attributes:
        largest: max|result − oracle| over the scale.
        whole: ‖result − oracle‖ over ‖oracle‖ (2-norms), which sees what a coarse dtype's largest error hides: a result
            that is 1% too large everywhere.
    """

    largest: float
    whole: float


def errors(results: Sequence[Tensor], oracle: Sequence[Tensor], scales: Sequence[float] | None = None) -> Errors:
    """Compare results with the oracle.

    Args:
        results: Tensors of any dtype.
        oracle: The same in float64.
        scales: What each largest error is divided by; max|oracle| by default.

    Raises:
        ValueError: The numbers or shapes of tensors differ.
    """
    if len(results) != len(oracle):
        raise ValueError(f"results: got {len(results)} tensors, expected {len(oracle)}")
    largest = whole = 0.0
    for i, (result, exact) in enumerate(zip(results, oracle, strict=True)):
        if result.shape != exact.shape:
            raise ValueError(f"results[{i}]: got shape {tuple(result.shape)}, expected {tuple(exact.shape)}")
        exact = exact.double()
        off = result.to(exact.device).double() - exact
        scale = scales[i] if scales is not None else float(exact.abs().max())
        worst = float(off.abs().max()) / max(scale, 1e-300)
        total = float(off.norm()) / max(float(exact.norm()), scale * exact.numel() ** 0.5 * 1e-3, 1e-300)
        # NaN is further off than anything
        largest = max(largest, worst if worst == worst else float("inf"))
        whole = max(whole, total if total == total else float("inf"))
    return Errors(largest, whole)


def allowed(reference: Errors, dtype: torch.dtype, factor: float = 1.0) -> Errors:
    """Return the most that a side may be off: twice the reference's error in the same dtype, and two roundings.

    The whole may be off by twice the reference's and a quarter of a rounding: a half in 256 for bfloat16's coarse steps
    is the most that one rounding moves one element, and over many it averages out.
    """
    eps = torch.finfo(dtype).eps
    return Errors(factor * (2 * reference.largest + 2 * eps), factor * (2 * reference.whole + eps / 4))


def complaint(found: Errors, most: Errors) -> str | None:
    """Return what is wrong with a side, or None."""
    if found.largest > most.largest:
        return f"wrong: error {found.largest:.1e}, allowed {most.largest:.1e}"
    if found.whole > most.whole:
        return f"wrong: error of the whole {found.whole:.1e}, allowed {most.whole:.1e}"
    return None
