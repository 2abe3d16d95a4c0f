"""Attention in Triton, forward and backward: what is launched, with which configuration.

The kernels are in :mod:`~clipfast.kernels.attention_whole` (all keys of a head on chip) and
:mod:`~clipfast.kernels.attention_streaming` (any length); :mod:`~clipfast.kernels.attention_policy` chooses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from clipfast.kernels import attention_policy as policy
from clipfast.kernels import card
from clipfast.kernels.aot import Call, tensor
from clipfast.kernels.attention_policy import Streaming, Whole
from clipfast.kernels.attention_streaming import (
    streaming_backward_keys,
    streaming_backward_queries,
    streaming_forward,
)
from clipfast.kernels.attention_whole import whole_backward, whole_forward
from clipfast.kernels.launch import cdiv

LOG2_E = math.log2(math.e)


def forward(qkv: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention's output and what the backward pass needs of every softmax: the log2 of its denominator.

    Args:
        qkv: ``[B, N, 3, H, D]``, or ``[total, 3, H, D]`` with ``cu_seqlens``; read in place if the last dimension is
            contiguous.
        cu_seqlens: ``[S + 1]``, int32, on the device of ``qkv``.
        causal: Whether a token attends to itself and those before it only.
        scale: The factor before the softmax.

    Returns:
        ``[B, N, H·D]`` (``[total, H·D]``) in the dtype of ``qkv``, and ``[P, H, B·N]`` (``[P, H, total]``) in fp32. P
        is 1; for fp32 inputs it is 2 (:func:`~clipfast.kernels.attention_tiles.store_statistics`).
    """
    qkv = _readable(qkv)
    *lead, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(*lead, heads * head_dim)
    lse = qkv.new_empty(2 if qkv.dtype == torch.float32 else 1, heads, math.prod(lead), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tokens = None if cu_seqlens is not None else lead[-1]
    if tokens == 1:
        # a softmax of one term: the value itself, and below no gradient but the value's. Exactly, as the reference
        return out.copy_(qkv[:, :, 2].flatten(2)), lse.zero_()
    plan = policy.forward_plan(_architecture(qkv.device), tokens, head_dim, qkv.element_size(), causal)
    sequences = lead[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (heads, lead[-1], lse.shape[2])
    unit, sign = policy.unit(qkv.stride()), policy.sign(scale)
    constexprs = plan_constexprs(plan, head_dim, causal, unit) | {"SIGN": sign}
    # the largest score of a row is that of the largest product; a factor of 0 would meet masked scores, which are -inf
    log2_scale = abs(scale) * LOG2_E if sign else 1.0
    options = {"num_warps": plan.warps, "num_stages": plan.stages}
    if isinstance(plan, Whole):
        tiles = cdiv(lead[-1] - plan.class_token, plan.queries)
        # few heads: more programs, each with a share of the query tiles
        splits = min(tiles, cdiv(2 * _multiprocessors(qkv.device), sequences * heads))
        whole_forward[(sequences * heads * splits,)](
            qkv, out, lse, *_strides(qkv, unit), *shape, splits, log2_scale, **constexprs, **options
        )
        return out, lse
    exact = lse.shape[0] == 2
    splits = _splits(lse.shape[2], sequences, plan.queries, plan.class_token)
    streaming_forward[(sequences * heads * splits,)](
        qkv, out, lse, cu_seqlens, *_strides(qkv, unit), *shape, splits, log2_scale,
        PACKED=cu_seqlens is not None, EXACT=exact, **constexprs, **options,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """Return the gradient of ``qkv``, packed like it and contiguous.

    Args:
        d_out: ``[B, N, H·D]`` (``[total, H·D]``), the gradient of the output, in its dtype.
        qkv, out, lse, cu_seqlens, causal, scale: What :func:`forward` took and returned.
    """
    qkv, d_out = _readable(qkv), _on_16_bytes(d_out.contiguous())
    *lead, _, heads, head_dim = qkv.shape
    d_qkv = qkv.new_empty(qkv.shape)
    if d_qkv.numel() == 0:
        return d_qkv
    tokens = None if cu_seqlens is not None else lead[-1]
    if tokens == 1:
        d_qkv[:, :, :2] = 0
        d_qkv[:, :, 2] = d_out.unflatten(-1, (heads, head_dim))
        return d_qkv
    plans = policy.backward_plan(_architecture(qkv.device), tokens, head_dim, qkv.element_size(), causal)
    sequences = lead[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shape = (heads, lead[-1], lse.shape[2])
    unit = policy.unit(qkv.stride())
    if isinstance(plans, Whole):
        whole_backward[(sequences * heads,)](
            qkv, out, lse, d_out, d_qkv, *_strides(qkv, unit), *shape, scale, scale * LOG2_E,
            **plan_constexprs(plans, head_dim, causal, unit), num_warps=plans.warps, num_stages=plans.stages,
        )  # fmt: skip
        return d_qkv
    for_queries, for_keys = plans
    forward_plan = policy.forward_plan(_architecture(qkv.device), tokens, head_dim, qkv.element_size(), causal)
    exact = lse.shape[0] == 2 and isinstance(forward_plan, Streaming)
    delta = lse.new_empty(lse.shape[1:])
    scales = (scale, scale * LOG2_E)
    splits = _splits(lse.shape[2], sequences, for_queries.queries, for_queries.class_token)
    streaming_backward_queries[(sequences * heads * splits,)](
        qkv, out, lse, delta, cu_seqlens, d_out, d_qkv, *_strides(qkv, unit), *shape, splits, *scales,
        PACKED=cu_seqlens is not None, EXACT=exact, **plan_constexprs(for_queries, head_dim, causal, unit),
        num_warps=for_queries.warps, num_stages=for_queries.stages,
    )  # fmt: skip
    splits = _splits(lse.shape[2], sequences, for_keys.keys, for_keys.class_token)
    streaming_backward_keys[(sequences * heads * splits,)](
        qkv, lse, delta, cu_seqlens, d_out, d_qkv, *_strides(qkv, unit), *shape, splits, *scales,
        PACKED=cu_seqlens is not None, EXACT=exact, **plan_constexprs(for_keys, head_dim, causal, unit),
        num_warps=for_keys.warps, num_stages=for_keys.stages,
    )  # fmt: skip
    return d_qkv


def _readable(qkv: Tensor) -> Tensor:
    """Return ``qkv``, or a copy of one whose layout the kernels cannot read in place."""
    return _on_16_bytes(qkv if policy.in_place(qkv.stride()) else qkv.contiguous())


def _on_16_bytes(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of one that starts elsewhere: Triton would compile another kernel for it."""
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 16 else x


def _strides(qkv: Tensor, unit: int) -> tuple[int, int, int, int]:
    """Return the strides of sequences (0 when packed), tokens, parts (q, k, v) and heads in units."""
    batch = qkv.stride(0) if qkv.dim() == 5 else 0
    return (batch // unit, *(stride // unit for stride in qkv.stride()[-4:-1]))


def _splits(tokens: int, sequences: int, tile: int, class_token: bool) -> int:
    """Return how many programs share a sequence: one a tile of the average one, so that none of them is idle.

    The class token of equally long sequences has a program of its own, the last.
    """
    return max(1, cdiv(tokens // max(sequences, 1) - class_token, tile) + class_token)


def _architecture(device: torch.device) -> int:
    return policy.architecture(card.capability(device))


def _multiprocessors(device: torch.device) -> int:
    return card.multiprocessors(device, interpreted=1)


def plan_constexprs(plan: Whole | Streaming, head_dim: int, causal: bool, unit: int) -> dict[str, Any]:
    """Return the compile-time arguments that a plan gives its kernel."""
    if isinstance(plan, Whole):
        keys = {"KEYS_0": plan.keys[0], "KEYS_1": plan.keys[1]}
    else:
        keys = {"KEYS": plan.keys}
    return keys | {
        "D": head_dim,
        "BLOCK_D": policy.block_d(head_dim),
        "QUERIES": plan.queries,
        "CLASS_TOKEN": plan.class_token,
        "CAUSAL": causal,
        "UNIT": unit,
    }


# What is compiled ahead of time of every head_dim that is served: each padded width whole, and padded with rows that
# are multiples of 32 bytes (96) and that are not (40, 72). The others' machine code differs in constants alone.
AOT_HEAD_DIMS = (32, 40, 64, 72, 96, 128)


def aot_calls() -> Iterator[Call]:
    """Yield calls that reach every configuration: each class of lengths, with and without the causal mask."""
    for dtype, head_dim, causal in itertools.product(("bf16", "fp16", "fp32"), AOT_HEAD_DIMS, (False, True)):
        for tokens in (50, 77, 128, 197, 256, 257, 577, 1024, None):
            yield aot_call(256, tokens, 12, head_dim, dtype, causal)
    for tokens, sign in itertools.product((77, 197, 257, None), (-1, 0)):
        yield aot_call(256, tokens, 12, 64, "bf16", False, sign)


def aot_call(
    batch: int, tokens: int | None, heads: int, head_dim: int, dtype: str, causal: bool, sign: int = 1
) -> Call:
    """Return a call of :func:`forward` and :func:`backward`; without ``tokens`` of packed captions, 20 tokens each."""
    packed = tokens is None
    lead = (20 * batch,) if tokens is None else (batch, tokens)
    words = [
        f"attention {dtype} D={head_dim}",
        "packed" if packed else f"{tokens} tokens",
        *(["causal"] if causal else []),
        *([f"scale {sign}"] if sign != 1 else []),
    ]
    scale = sign * head_dim**-0.5

    def run() -> None:
        qkv = tensor(*lead, 3, heads, head_dim, dtype=dtype)
        offsets = tensor(batch + 1, dtype="i32") if packed else None
        out, lse = forward(qkv, offsets, causal, scale)
        backward(torch.empty_like(out), qkv, out, lse, offsets, causal, scale)

    return Call(", ".join(words), run, half=dtype != "fp32", quick=dtype == "bf16" and head_dim == 64 and sign == 1)
