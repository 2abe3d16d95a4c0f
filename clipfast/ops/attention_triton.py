"""The Triton kernels of attention as PyTorch operators with gradients; what they serve and what they do not."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import attention_packed, kernel_ops

HEAD_DIMS = (32, 64, 80, 96, 104, 128)


def _fake_forward(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    *lead, _, heads, head_dim = qkv.shape
    rows = lead[0] if len(lead) == 1 else lead[0] * lead[1]
    statistics = 2 if qkv.dtype == torch.float32 else 1
    return qkv.new_empty(*lead, heads * head_dim), qkv.new_empty(statistics, heads, rows, dtype=torch.float32)


def _fake_backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float
) -> Tensor:
    return qkv.new_empty(qkv.shape)


kernel_ops.define(
    "attention(Tensor qkv, Tensor? cu_seqlens, bool causal, float scale) -> (Tensor, Tensor)",
    "attention",
    "forward",
    _fake_forward,
)
kernel_ops.define(
    "attention_backward(Tensor d_out, Tensor qkv, Tensor out, Tensor lse, Tensor? cu_seqlens, bool causal, float scale)"
    " -> Tensor",
    "attention",
    "backward",
    _fake_backward,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> Tensor:
        out, lse = torch.ops.clipfast.attention(qkv, cu_seqlens, causal, scale)
        ctx.save_for_backward(qkv, out, lse, cu_seqlens)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        gradient = torch.ops.clipfast.attention_backward(d_out, *ctx.saved_tensors, ctx.causal, ctx.scale)
        return gradient, None, None, None


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> Tensor:
    """Return attention's output by the Triton kernels; arguments as those of every implementation.

    The kernels read ``qkv`` in place if its last dimension is contiguous, and a copy of it if not. Offsets are taken
    as int32 on the device of ``qkv``; nothing waits for the device, wherever they lie.
    """
    if cu_seqlens is not None:
        cu_seqlens = attention_packed.on_device(cu_seqlens, qkv.device)
    return _Attention.apply(qkv, cu_seqlens, causal, scale)


def refusal(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> str | None:
    """Return why the kernels cannot serve a call, or None."""
    if qkv.shape[-1] not in HEAD_DIMS:
        return f"head_dim {qkv.shape[-1]} is not served ({', '.join(map(str, HEAD_DIMS))} are)"
    return kernel_ops.refusal(qkv)


def shape_class(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> str:
    """Return a call's key in the table of measurements: dtype, head_dim, mask, length, and few heads or many."""
    if cu_seqlens is None:
        tokens = qkv.shape[1]
        bound = next((bound for bound in (64, 80, 128, 256, 257, 577) if tokens <= bound), None)
        length, sequences = f"≤ {bound} tokens" if bound else "> 577 tokens", qkv.shape[0]
    else:
        length, sequences = "packed", cu_seqlens.shape[0] - 1
    dtype = str(qkv.dtype).removeprefix("torch.")
    # few: a large card has a multiprocessor for each
    heads = "few" if sequences * qkv.shape[-2] < 256 else "many"
    return f"{dtype}, head_dim {qkv.shape[-1]}, {'causal, ' if causal else ''}{length}, {heads} heads"
