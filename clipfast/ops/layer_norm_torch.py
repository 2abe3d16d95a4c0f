"""LayerNorm in PyTorch: the specification, and what the kernels' operators are without the kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops.bias_gradients import with_bias_gradient


def reference(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return ``layer_norm(x)``, ``[..., C]`` in the dtype of ``x``."""
    # one dtype for all three: CUDA's kernel takes no other, and none of them may lose digits here
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), bias.dtype)
    y = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype)


def reference_add(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, bias_of_x: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(layer_norm(x + residual), x + residual)`` in the dtype of the sum."""
    residual = residual + (x if bias_of_x is None else with_bias_gradient(x, bias_of_x))
    return reference(residual, weight, bias, eps), residual


def _rows_of_statistics(x: Tensor, statistic: Tensor) -> Tensor:
    return statistic.view(*x.shape[:-1], 1)


def _statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    variance, mean = torch.var_mean(x.float(), -1, correction=0)
    return mean.flatten(), (variance + eps).rsqrt().flatten()


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return the layer's output, and the mean and the reciprocal deviation of every row in float32, ``[rows]``."""
    return reference(x, weight, bias, eps).contiguous(), *_statistics(x, eps)


def add_forward(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    """Return the layer's output, the sum, and the statistics of its rows."""
    y, stream = reference_add(x, residual, weight, bias, eps)
    return y.contiguous(), stream.contiguous(), *_statistics(stream, eps)


def _gradients(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    statistics = (_rows_of_statistics(x, t) for t in (mean, rstd))
    # the bias has the weight's shape and dtype, and its values do not matter
    return torch.ops.aten.native_layer_norm_backward(
        dy.float(), x.float(), x.shape[-1:], *statistics, weight.float(), weight.float(), [True, True, True]
    )


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of ``x``, ``weight`` and ``bias``."""
    dx, dweight, dbias = _gradients(dy, x, weight, mean, rstd)
    return dx.to(x.dtype).contiguous(), dweight.to(weight.dtype), dbias.to(weight.dtype)


# twice: an operator's kernel, its fake and its plain form have one signature
def add_backward(
    dy: Tensor,
    dstream: Tensor,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Return the gradients of ``x`` and ``residual`` (empty where it is that of ``x``), ``weight`` and ``bias``.

    And the sum of the first over rows in ``sum_dtype``, empty where that is None.
    """
    dx, dweight, dbias = _gradients(dy, stream, weight, mean, rstd)
    dx = (dx + dstream.float()).contiguous()
    other = dx.new_empty(0, dtype=residual_dtype) if x_dtype == residual_dtype else dx.to(residual_dtype)
    total = dx.new_empty(0) if sum_dtype is None else dx.flatten(0, -2).sum(0).to(sum_dtype)
    return dx.to(x_dtype), other, dweight.to(weight.dtype), dbias.to(weight.dtype), total
