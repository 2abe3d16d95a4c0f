"""Multi-head attention that reads packed queries, keys and values in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipfast.ops import attention_packed, attention_torch, attention_triton, attention_varlen, dispatch, keys
from clipfast.ops.call_classes import LARGE


def attention(
    qkv: Tensor,
    num_heads: int,
    *,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head self-attention, ``softmax(scale · Q Kᵀ) V`` for every head.

    Args:
        qkv: Packed queries, keys and values as the QKV projection writes them: ``[B, N, 3·H·D]`` or its view
            ``[B, N, 3, H, D]``; with ``cu_seqlens``, ``[total, 3·H·D]`` or ``[total, 3, H, D]``. Floating point.
        num_heads: The number of heads, H.
        causal: Whether token i attends to tokens 0..i only.
        cu_seqlens: Offsets ``[S + 1]`` (int32 or int64) of S sequences packed one behind the other, as in
            FlashAttention: starts at 0, never decreases, ends at ``total``.
        scale: The factor before the softmax; by default ``D ** -0.5``.

    Returns:
        ``[B, N, H·D]`` (``[total, H·D]`` with ``cu_seqlens``) in the dtype of ``qkv``, ready for the output
        projection.

    Raises:
        TypeError: ``qkv`` is not floating point, or ``cu_seqlens`` not int32 or int64.
        ValueError: The shapes do not fit, there are no tokens, or ``cu_seqlens`` is not as described (its values
            are checked where they lie in host memory).

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """
    return dispatch.call("attention", qkv, num_heads, causal, cu_seqlens, scale)


def attention_weights(qkv: Tensor, num_heads: int, *, causal: bool = False, scale: float | None = None) -> Tensor:
    """Return the softmax weights ``[B, H, N, N]`` (query, key) that :func:`attention` applies to the values."""
    qkv, causal, _, scale = _prepare(qkv, num_heads, causal, None, scale)
    return attention_torch.weights(qkv, causal, scale)


def _prepare(
    qkv: Tensor,
    num_heads: int,
    causal: bool = False,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, bool, Tensor | None, float]:
    """Check the arguments; return qkv as ``[B, N, 3, H, D]`` (``[total, 3, H, D]``) and the scale as a number."""
    if not qkv.is_floating_point():
        raise TypeError(f"attention(qkv): got {qkv.dtype}, expected a floating-point dtype")
    lead = ("total",) if cu_seqlens is not None else ("B", "N")
    if qkv.dim() == len(lead) + 1 and num_heads > 0 and qkv.shape[-1] % (3 * num_heads) == 0:
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    if qkv.dim() != len(lead) + 3 or tuple(qkv.shape[-3:-1]) != (3, num_heads):
        names = ", ".join(lead)
        raise ValueError(
            f"attention(qkv): got shape {tuple(qkv.shape)}, expected [{names}, 3·H·D] or [{names}, 3, H, D] "
            f"with H = num_heads = {num_heads}"
        )
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, qkv.shape[0])
    elif qkv.shape[1] == 0:
        raise ValueError("attention(qkv): got 0 tokens, expected at least 1")
    return qkv, causal, cu_seqlens, 1 / math.sqrt(qkv.shape[-1]) if scale is None else float(scale)


def _check_cu_seqlens(cu_seqlens: Tensor, total: int) -> None:
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"attention(cu_seqlens): got {cu_seqlens.dtype}, expected int32 or int64")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"attention(cu_seqlens): got shape {tuple(cu_seqlens.shape)}, expected [S + 1]")
    # reading values off a device would wait for it, and cannot be captured in a graph
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        attention_packed.check(cu_seqlens, total)


def _signature(
    qkv: Tensor, num_heads: int, causal: bool, cu_seqlens: Tensor | None, scale: float | None
) -> tuple[Any, ...]:
    if scale is not None:
        scale = float(scale)
    # a kernel that reads in place is one for aligned heads or another
    where = None if qkv.is_cpu else (keys.place(qkv, 3 * LARGE), qkv.stride())
    if cu_seqlens is None:
        return qkv.shape, num_heads, causal, scale, qkv.dtype, where, keys.moment(qkv)
    # the number of tokens is another in every batch
    offsets = cu_seqlens.dtype, cu_seqlens.dim(), cu_seqlens.numel() > 0
    return qkv.shape[1:], num_heads, causal, scale, qkv.dtype, where, keys.moment(qkv), offsets


def _bind(
    run: Callable[..., Tensor], request: tuple[Any, ...], qkv: Tensor, num_heads: int, *_: object
) -> Callable[..., Tensor]:
    """Return what makes an implementation's arguments, as :func:`_prepare` does, of those with a known signature."""
    checked, _, offsets, scale = request
    *lead, three, heads, head_dim = checked.shape
    whole = qkv.dim() == checked.dim()

    def packed(qkv: Tensor, num_heads: int, causal: bool, cu_seqlens: Tensor, _: float | None) -> Tensor:
        total = qkv.shape[0]
        if cu_seqlens.is_cpu:
            attention_packed.check(cu_seqlens, total)
        return run(qkv if whole else qkv.view(total, three, heads, head_dim), causal, cu_seqlens, scale)

    def dense(qkv: Tensor, num_heads: int, causal: bool, cu_seqlens: None, _: float | None) -> Tensor:
        # one by one, which is twice as fast as a size
        return run(qkv if whole else qkv.view(batch, tokens, three, heads, head_dim), causal, None, scale)

    if offsets is not None:
        return packed
    batch, tokens = lead
    return dense


dispatch.register(
    "attention",
    _prepare,
    dispatch.Implementation(
        "triton",
        "packed queries, keys and values in place",
        attention_triton.attention,
        attention_triton.refusal,
    ),
    dispatch.Implementation(
        "torch", attention_varlen.DESCRIPTION, attention_varlen.attention, attention_varlen.refusal
    ),
    dispatch.Implementation("torch", "scaled_dot_product_attention", attention_torch.attention),
    dispatch.Implementation("reference", "explicit softmax in plain PyTorch", attention_torch.reference),
    key=keys.of_attention,
    signature=_signature,
    bind=_bind,
)
