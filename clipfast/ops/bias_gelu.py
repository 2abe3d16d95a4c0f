"""Bias and GELU, the step between the two linear layers of an MLP."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import bias_gelu_native, dispatch, kernel_ops, keys, trust
from clipfast.ops.call_classes import LARGE, Key
from clipfast.ops.probes import probe_rows, random

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
    return dispatch.remembered("bias_gelu", _signature_of_layer, _kernel_adds_bias, x, bias, approximate)


def _signature_of_layer(x: Tensor, bias: Tensor, approximate: str) -> tuple[Any, ...]:
    width = bias.shape[0]
    if x.is_cpu:
        where = keys.place(x, _WIDER * LARGE, bias)
    else:
        where = x.shape[:-1].numel() * width >= _WIDER * LARGE, x.device, bias.get_device()
    return "adds bias", approximate, width, x.dtype, bias.dtype, where, keys.moment(x)


def _kernel_adds_bias(x: Tensor, bias: Tensor, approximate: str) -> bool:
    # what the product will look like, without its memory
    product = x.new_empty((), dtype=keys.autocast_dtype(x) or x.dtype).expand(*x.shape[:-1], bias.shape[0])
    return dispatch.chosen("bias_gelu", product, bias, approximate) in ("triton", "native")


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


def _plain_forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return _reference(x, bias, approximate).contiguous()


def _plain_backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    inputs = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    with torch.enable_grad():
        y = _reference(inputs[0], inputs[1] if bias is not None else None, approximate)
    dx, *dbias = torch.autograd.grad(y, inputs, dy)
    return dx.contiguous(), dbias[0] if dbias else x.new_empty(0)


def _trial(x: Tensor, bias: Tensor | None, approximate: str, backward: bool) -> trust.Trial:
    """Return how the kernel that a call gets is checked."""
    return _trial_of(x.device, backward, approximate, x.shape[-1], x.dtype, None if bias is None else bias.dtype)


# every launch on a card asks for it: its name is put together once
@functools.cache
def _trial_of(
    device: torch.device, backward: bool, approximate: str, width: int, x: torch.dtype, bias: torch.dtype | None
) -> trust.Trial:
    key, direction = (approximate, width, x, bias), "backward" if backward else "forward"
    added = "" if bias is None else f", bias {str(bias).removeprefix('torch.')}"
    name = f"bias_gelu {direction}, {approximate}, width {width}, {str(x).removeprefix('torch.')}{added}"
    return trust.Trial(name, key, lambda programs: _probe(device, programs, *key, backward))


def _probe(
    device: torch.device,
    programs: int,
    approximate: str,
    width: int,
    x: torch.dtype,
    bias: torch.dtype | None,
    backward: bool,
) -> trust.Probe:
    # 21 rows leave tiles unfilled; a program has 8 rows of a share of the columns
    copies = max(2, 8 * programs // 21)
    shared = () if bias is None else (random(2, device, bias, width),)
    # up to ±6, where the tails are
    rows, d_outputs = (2 * random(1, device, x, 21, width),), (random(3, device, x, 21, width),) if backward else ()

    def launch(rows: tuple[Tensor, ...], shared: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...]) -> list[Tensor]:
        arguments = (*d_outputs, *rows, shared[0] if shared else None, approximate)
        found = kernel_ops.kernel("bias_gelu", "backward" if backward else "forward")(*arguments)
        return list(found)[: 1 + len(shared)] if backward else [found]

    def reference(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return _reference(x, bias, approximate)

    return probe_rows(rows, shared, d_outputs, copies, launch, reference)


def _trials(x: Tensor, bias: Tensor | None, approximate: str) -> list[trust.Trial]:
    directions = (False, True) if torch.is_grad_enabled() else (False,)
    return [_trial(x, bias, approximate, backward) for backward in directions]


kernel_ops.define(
    "bias_gelu_forward(Tensor x, Tensor? bias, str approximate) -> Tensor",
    "bias_gelu",
    "bias_gelu",
    "forward",
    _fake_forward,
    _plain_forward,
    lambda x, bias, approximate: [_trial(x, bias, approximate, backward=False)],
)
kernel_ops.define(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, str approximate) -> (Tensor, Tensor)",
    "bias_gelu",
    "bias_gelu",
    "backward",
    _fake_backward,
    _plain_backward,
    lambda dy, x, bias, approximate: [_trial(x, bias, approximate, backward=True)],
)


_forward = torch.ops.clipfast.bias_gelu_forward.default
_backward = torch.ops.clipfast.bias_gelu_backward.default


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return _forward(x, bias, approximate)

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = _backward(dy, x, bias, ctx.approximate)
        return dx, None if bias is None else dbias, None


def _triton(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return (_BiasGelu.apply if kernel_ops.is_recorded() else _forward)(x, bias, approximate)


def _triton_refusal(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    if x.shape[-1] == 0:
        return "width 0 is not served"
    return kernel_ops.refusal("bias_gelu", lambda: _trials(x, bias, approximate), x, bias)


# an MLP is four times as wide as the stream
_WIDER = 4


def _key(x: Tensor, bias: Tensor | None, approximate: str) -> Key:
    return keys.of_rows("bias_gelu", x, bias, scale=_WIDER, form=approximate, bias=bias is not None)


def _signature(x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Any, ...]:
    if bias is None:
        where = keys.place(x, _WIDER * LARGE)
        return approximate, x.shape[-1], x.dtype, where, keys.moment(x)
    where = keys.place(x, _WIDER * LARGE, bias)
    return approximate, x.shape[-1], x.dtype, bias.dim(), bias.numel(), bias.dtype, where, keys.moment(x)


dispatch.register(
    "bias_gelu",
    _prepare,
    dispatch.Implementation(
        "native", "bias and GELU in one pass", bias_gelu_native.implementation(_reference), bias_gelu_native.refusal
    ),
    dispatch.Implementation("triton", "bias and GELU in one pass", _triton, _triton_refusal),
    dispatch.Implementation("reference", "plain PyTorch", _reference),
    key=_key,
    signature=_signature,
)
