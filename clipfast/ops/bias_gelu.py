"""Bias and GELU, the step between the two linear layers of an MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import dispatch, kernel_ops

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


def kernel_adds_bias(x: Tensor, bias: Tensor, approximate: str = "none") -> bool:
    """Return whether a kernel adds the bias of a linear layer together with the GELU behind it.

    Elsewhere the layer's product adds it for nothing.

    Args:
        x: ``[..., C]``, the input of the layer.
        bias: ``[H]``, the layer's.
        approximate: As for :func:`bias_gelu`.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # what the product will look like, without its memory
    product = x.new_empty((), dtype=dtype).expand(*x.shape[:-1], bias.shape[0])
    return dispatch.chosen("bias_gelu", product, bias, approximate) == "triton"


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


def _fake_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


kernel_ops.define(
    "bias_gelu_forward(Tensor x, Tensor? bias, str approximate) -> Tensor", "bias_gelu", "forward", _fake_forward
)
kernel_ops.define(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    "bias_gelu",
    "backward",
    _fake_backward,
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return torch.ops.clipfast.bias_gelu_forward(x, bias, approximate)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = torch.ops.clipfast.bias_gelu_backward(dy, x, bias, ctx.approximate)
        return dx, None if bias is None else dbias, None


def _triton(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return _BiasGelu.apply(x, bias, approximate)


def _triton_refusal(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    return "width 0 is not served" if x.shape[-1] == 0 else kernel_ops.refusal(x, bias)


def _shape_class(x: Tensor, bias: Tensor | None, approximate: str) -> str:
    return f"{approximate}, {kernel_ops.rows_class(x)}"


dispatch.register(
    "bias_gelu",
    _prepare,
    dispatch.Implementation("triton", "bias and GELU in one pass", _triton, _triton_refusal, measured=True),
    dispatch.Implementation("reference", "plain PyTorch", _reference),
    shape_class=_shape_class,
)
