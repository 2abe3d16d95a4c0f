"""LayerNorm on the CPU by the op library: its operators with gradients, and what they serve."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import layer_norm_torch, native_rows

_ops = torch.ops.clipfast


def _statistics(x: Tensor) -> Tensor:
    return x.new_empty((2, x.shape[:-1].numel()), dtype=torch.float32)


@native_rows.fake("native_layer_norm")
def _fake(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), _statistics(x)


@native_rows.fake("native_add_layer_norm")
def _fake_add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(x.shape, dtype=dtype), _statistics(x)


@native_rows.fake("native_layer_norm_backward")
def _fake_backward(dy: Tensor, x: Tensor, weight: Tensor, statistics: Tensor) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@native_rows.fake("native_add_layer_norm_backward")
def _fake_add_backward(
    dy: Tensor,
    d_stream: Tensor,
    stream: Tensor,
    weight: Tensor,
    statistics: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    sum_dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    other = stream.new_empty(0 if x_dtype == residual_dtype else stream.shape, dtype=residual_dtype)
    total = weight.new_empty(0) if sum_dtype is None else weight.new_empty(weight.shape, dtype=sum_dtype)
    parameters = weight.new_empty(weight.shape), weight.new_empty(weight.shape)
    return stream.new_empty(stream.shape, dtype=x_dtype), other, *parameters, total


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, statistics = _ops.native_layer_norm.default(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *native_rows.differentiable(
                layer_norm_torch.reference, (x, weight, bias), (ctx.eps,), (dy,), ctx.needs_input_grad
            ), None
        return *_ops.native_layer_norm_backward.default(dy, x, weight, statistics), None


class _AddLayerNorm(torch.autograd.Function):
    # twice: what is applied in the place of the kernels' function takes its arguments
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        bias_of_x: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, stream, statistics = _ops.native_add_layer_norm.default(x, residual, weight, bias, eps)
        ctx.save_for_backward(stream, weight, bias, statistics)
        ctx.eps, ctx.dtypes = eps, (x.dtype, residual.dtype)
        ctx.sum_dtype = None if bias_of_x is None else bias_of_x.dtype
        return y, stream

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor, d_stream: Tensor) -> tuple[Tensor | None, ...]:
        stream, weight, bias, statistics = ctx.saved_tensors
        (x_dtype, residual_dtype), sum_dtype = ctx.dtypes, ctx.sum_dtype
        if torch.is_grad_enabled():
            # the stream was made here: what comes from it is derived through x and residual, as autograd records it
            d, d_weight, d_bias = native_rows.differentiable(
                layer_norm_torch.reference,
                (stream, weight, bias),
                (ctx.eps,),
                (dy,),
                (True, *ctx.needs_input_grad[2:4]),
            )
            d = d + d_stream
            total = None if sum_dtype is None else d.flatten(0, -2).sum(0).to(sum_dtype)
            return d.to(x_dtype), d.to(residual_dtype), d_weight, d_bias, None, total
        dx, d_residual, d_weight, d_bias, total = _ops.native_add_layer_norm_backward.default(
            dy, d_stream, stream, weight, statistics, x_dtype, residual_dtype, sum_dtype
        )
        # the gradient of a sum is that of both terms
        d_residual = dx if x_dtype == residual_dtype else d_residual
        return dx, d_residual, d_weight, d_bias, None, None if sum_dtype is None else total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return ``layer_norm(x)`` by the op library."""
    if native_rows.is_recorded(x, weight, bias):
        return _LayerNorm.apply(x, weight, bias, eps)
    return _ops.native_layer_norm.default(x, weight, bias, eps)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(layer_norm(x + residual), x + residual)`` by the op library."""
    if native_rows.is_recorded(x, residual, weight, bias, bias_of_x):
        return _AddLayerNorm.apply(x, residual, weight, bias, eps, bias_of_x)
    return _ops.native_add_layer_norm.default(x, residual, weight, bias, eps)[:2]


def refusal(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> str | None:
    """Return why the op library cannot serve a call of ``layer_norm``, or None."""
    return native_rows.refusal(x, weight, bias) or _unlike(weight, bias)


def add_refusal(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor | None = None
) -> str | None:
    """Return why the op library cannot serve a call of ``add_layer_norm``, or None."""
    return native_rows.refusal(x, residual, weight, bias, bias_of_x) or _unlike(weight, bias)


def _unlike(weight: Tensor, bias: Tensor) -> str | None:
    return "weight and bias differ in dtype" if weight.dtype != bias.dtype else None
