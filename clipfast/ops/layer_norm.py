"""LayerNorm, alone and with the residual addition before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import dispatch, kernel_ops

# the widest row that a program of the kernels holds
MAX_KERNEL_WIDTH = 4096


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Normalise every row of ``x`` over its last dimension, then scale and shift it.

    Args:
        x: ``[..., C]``, floating point.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.

    Returns:
        ``[..., C]`` in the dtype of ``x``. Statistics are taken in float32 at least.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``weight`` or ``bias`` is not ``[C]``.

    Source: Ba et al., "Layer Normalization" (2016).
    """
    return dispatch.call("layer_norm", x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream and normalise the sum.

    Args:
        x: ``[..., C]``, what a block adds to the stream.
        residual: ``[..., C]``, the stream.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.

    Returns:
        ``(layer_norm(x + residual), x + residual)``, both ``[..., C]`` in the dtype of the sum.

    Raises:
        TypeError: ``x`` is not floating point.
        ValueError: ``residual`` has not the shape of ``x``, or ``weight`` or ``bias`` is not ``[C]``.
    """
    return dispatch.call("add_layer_norm", x, residual, weight, bias, eps)


def _prepare(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor, float]:
    if not x.is_floating_point():
        raise TypeError(f"layer_norm(x): got {x.dtype}, expected a floating-point dtype")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm({name}): got shape {tuple(parameter.shape)}, expected {tuple(x.shape[-1:])}, "
                f"the last dimension of x"
            )
    return x, weight, bias, eps


def _prepare_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    if residual.shape != x.shape:
        raise ValueError(
            f"add_layer_norm(residual): got shape {tuple(residual.shape)}, expected {tuple(x.shape)}, that of x"
        )
    x, weight, bias, eps = _prepare(x, weight, bias, eps)
    return x, residual, weight, bias, eps


def _reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    # one dtype for all three: CUDA's kernel takes no other, and none of them may lose digits here
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype)


def _reference_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    residual = residual + x
    return _reference(residual, weight, bias, eps), residual


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    return x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), *_statistics(x)


def _fake_add_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype), *_statistics(x)


def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _fake_add_backward(
    dy: Tensor,
    dstream: Tensor,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    other = stream.new_empty(0 if x_dtype == residual_dtype else stream.shape, dtype=residual_dtype)
    parameters = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    return stream.new_empty(stream.shape, dtype=x_dtype), other, *parameters


kernel_ops.define(
    "layer_norm_forward(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    "layer_norm",
    "forward",
    _fake_forward,
)
kernel_ops.define(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    "layer_norm",
    "backward",
    _fake_backward,
)
kernel_ops.define(
    "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm",
    "add_forward",
    _fake_add_forward,
)
kernel_ops.define(
    "add_layer_norm_backward(Tensor dy, Tensor dstream, Tensor stream, Tensor weight, Tensor mean, Tensor rstd,"
    " ScalarType x_dtype, ScalarType residual_dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    "layer_norm",
    "add_backward",
    _fake_add_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, rstd = torch.ops.clipfast.layer_norm_forward(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *torch.ops.clipfast.layer_norm_backward(dy, *ctx.saved_tensors), None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, stream, mean, rstd = torch.ops.clipfast.add_layer_norm_forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(stream, weight, mean, rstd)
        ctx.dtypes = x.dtype, residual.dtype
        return y, stream

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor, dstream: Tensor) -> tuple[Tensor | None, ...]:
        dx, dresidual, dweight, dbias = torch.ops.clipfast.add_layer_norm_backward(
            dy, dstream, *ctx.saved_tensors, *ctx.dtypes
        )
        # the gradient of a sum is that of both terms
        same = ctx.dtypes[0] == ctx.dtypes[1]
        return dx, dx if same else dresidual, dweight, dbias, None


def _triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return _LayerNorm.apply(x, weight, bias, eps)


def _triton_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _AddLayerNorm.apply(x, residual, weight, bias, eps)


def _triton_refusal(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    if not 0 < x.shape[-1] <= MAX_KERNEL_WIDTH:
        return f"width {x.shape[-1]} is not served (1 to {MAX_KERNEL_WIDTH} are)"
    if weight.dtype != bias.dtype:
        return "weight and bias differ in dtype"
    return kernel_ops.refusal(x, weight, bias)


def _triton_add_refusal(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    return kernel_ops.refusal(x, residual) or _triton_refusal(x, weight, bias, eps)


def _shape_class(x: Tensor, *rest: object) -> str:
    return kernel_ops.rows_class(x)


dispatch.register(
    "layer_norm",
    _prepare,
    dispatch.Implementation("triton", "one pass over the rows", _triton, _triton_refusal, measured=True),
    dispatch.Implementation("reference", "F.layer_norm", _reference),
    shape_class=_shape_class,
)
dispatch.register(
    "add_layer_norm",
    _prepare_add,
    dispatch.Implementation("triton", "addition and norm in one pass", _triton_add, _triton_add_refusal, measured=True),
    dispatch.Implementation("reference", "addition, then F.layer_norm", _reference_add),
    shape_class=_shape_class,
)
