"""Gradients of linear layers' biases that take no pass over the tokens of their own.

A bias' gradient is the sum over rows of the gradient of the layer's result. Where another backward pass holds that, or
the sum follows from another one, the layer's product is taken with the bias as a constant, and the gradient gets to the
bias by one of these ways back. None of them changes a value.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


def with_bias_gradient(x: Tensor, bias: Tensor) -> Tensor:
    """Return ``x``, ``[..., C]``, which has a bias ``[C]`` already, with the way back for the bias' gradient."""
    return x + (bias - bias.detach()).to(x.dtype)


class _OfQueries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, bias: Tensor) -> Tensor:
        ctx.width, ctx.dtype = bias.shape[0], bias.dtype
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        of_queries = gradient.flatten(0, -2)[:, : ctx.width]
        return gradient, of_queries.sum(0, dtype=ctx.dtype)


class _OfValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, out_bias: Tensor, bias: Tensor, out_weight: Tensor) -> Tensor:
        ctx.save_for_backward(out_weight)
        ctx.dtype = bias.dtype
        return out_bias.view_as(out_bias)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return gradient, (gradient.to(weight.dtype) @ weight).to(ctx.dtype), None


def through_attention(qkv: Tensor, bias: Tensor, out_weight: Tensor, out_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Give the bias of the projection to queries, keys and values its gradient, with two thirds of it for nothing.

    The weights of a query sum to 1, so the values' bias passes attention as it is: its gradient is that of the output
    projection's bias times the output projection. The keys' bias adds the same to all of a query's scores, which
    softmax does not see: its gradient is 0. The queries' is summed.

    Args:
        qkv: ``[..., 3·W]``, the projection's result, computed with the bias as a constant; attention gets it next.
        bias: ``[3·W]``, its bias.
        out_weight: ``[W, W]``, the weight of the output projection, which gets what attention gives.
        out_bias: ``[W]``, its bias.

    Returns:
        ``(qkv, out_bias)`` with the ways back; the latter's gradient has to be that of the output projection's bias.
    """
    of_queries, _, of_values = bias.chunk(3)
    return _OfQueries.apply(qkv, of_queries), _OfValues.apply(out_bias, of_values, out_weight.detach())
