"""Bias and GELU on the CPU by the op library: its operators with gradients, and what they serve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import native_rows

_ops = torch.ops.clipfast
# as the operators number them
_FORMS = {"none": 0, "tanh": 1, "quick": 2}


@native_rows.fake("native_bias_gelu")
def _fake(x: Tensor, bias: Tensor | None, form: int) -> Tensor:
    return x.new_empty(x.shape)


@native_rows.fake("native_bias_gelu_backward")
def _fake_backward(dy: Tensor, x: Tensor, bias: Tensor | None, form: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, bias: Tensor | None, approximate: str, reference: Callable[..., Tensor]
    ) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate, ctx.reference = approximate, reference
        return _ops.native_bias_gelu.default(x, bias, _FORMS[approximate])

    @staticmethod
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs, rest = (x, bias), (ctx.approximate,)
            return *native_rows.differentiable(ctx.reference, inputs, rest, (dy,), ctx.needs_input_grad), None, None
        dx, d_bias = _ops.native_bias_gelu_backward.default(dy, x, bias, _FORMS[ctx.approximate])
        return dx, None if bias is None else d_bias, None, None


def implementation(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the op by the op library, whose gradients, where those are derived again, are ``reference``'s."""

    def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
        if native_rows.is_recorded(x, bias):
            return _BiasGelu.apply(x, bias, approximate, reference)
        return _ops.native_bias_gelu.default(x, bias, _FORMS[approximate])

    return bias_gelu


def refusal(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    """Return why the op library cannot serve a call of ``bias_gelu``, or None."""
    return native_rows.refusal(x, bias)
