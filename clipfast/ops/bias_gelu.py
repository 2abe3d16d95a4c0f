"""Bias and GELU, the step between the two linear layers of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import dispatch

APPROXIMATIONS = ("none", "tanh", "quick")


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """Add a bias and apply a Gaussian error linear unit.

    The three forms are three functions; weights trained with one are wrong with another.

    Args:
        x: ``[..., C]``, floating point.
        bias: ``[C]``, or None where it was added before.
        approximate: ``"none"``: ``x·Φ(x)`` by erf, open_clip's own weights and timm; ``"tanh"``: PyTorch's tanh
            form; ``"quick"``: ``x·σ(1.702·x)``, OpenAI's weights.

    Returns:
        ``[..., C]`` in the dtype of ``x``.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``bias`` is not ``[C]``, or ``approximate`` is none of the three.

    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016); the quick form is its equation with σ.
    """
    return dispatch.call("bias_gelu", x, bias, approximate)


def check_approximate(approximate: str, owner: str) -> str:
    """Return ``approximate``, or raise a ValueError in the name of ``owner``."""
    if approximate not in APPROXIMATIONS:
        raise ValueError(
            f"{owner}(approximate): got {approximate!r}, expected one of {', '.join(map(repr, APPROXIMATIONS))}"
        )
    return approximate


def _prepare(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> tuple[Tensor, Tensor | None, str]:
    if not x.is_floating_point():
        raise TypeError(f"bias_gelu(x): got {x.dtype}, expected a floating-point dtype")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu(bias): got shape {tuple(bias.shape)}, expected {tuple(x.shape[-1:])}, the last dimension of x"
        )
    return x, bias, check_approximate(approximate, "bias_gelu")


def _reference(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    if bias is not None:
        x = x + bias.to(x.dtype)
    if approximate == "quick":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=approximate)


dispatch.register("bias_gelu", _prepare, dispatch.Implementation("reference", "plain PyTorch", _reference))
