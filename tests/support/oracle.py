"""How far results are from an oracle, by the rules that the tests share."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return ``max|actual − expected| / max|expected|``; NaN anywhere gives NaN, which passes no bound."""
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    scale = expected.abs().max()
    assert scale > 0, "the oracle is zero everywhere: give the scale by hand"
    return float((actual.double() - expected.double()).abs().max() / scale.double())


def assert_as_exact_as_reference(
    fast: Tensor,
    reference: Tensor,
    oracle: Tensor,
    what: str,
    scale: float | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Check the contract of every fast path against an fp64 oracle.

    Its error may be at most twice that of the reference in the same dtype plus two units of rounding at the
    oracle's scale: ``max|oracle|``, or the natural scale of the sum behind it where the oracle is zero or a scalar.
    The unit is that of ``dtype`` where autocast computes in another one than it returns.
    """
    fast, reference, oracle = fast.detach(), reference.detach(), oracle.detach()
    assert fast.dtype == reference.dtype, f"{what}: got {fast.dtype}, expected {reference.dtype}"
    assert not fast.isnan().any(), f"{what}: NaN"
    error = float((fast.double() - oracle).abs().max())
    allowed = 2 * float((reference.double() - oracle).abs().max())
    allowed += 2 * torch.finfo(dtype or fast.dtype).eps * (float(oracle.abs().max()) if scale is None else scale)
    assert error <= allowed, f"{what}: error {error:.3e} exceeds {allowed:.3e}"
