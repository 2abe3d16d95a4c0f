"""Packed sequences by PyTorch's own attention: sequences of one length make one batch."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx


class _Permute(torch.autograd.Function):
    """``x[order]`` whose gradient is a gather by the inverse: PyTorch's own adds up, which a permutation needs not."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(gradient, inverse, order), None, None


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Return ``[total, H·D]`` from ``qkv [total, 3, H, D]`` and offsets ``cu_seqlens [S + 1]``.

    One call of ``scaled_dot_product_attention`` for every distinct length: captions have a few dozen of them, however
    many captions there are. Offsets on a GPU are read back, which waits for it.
    """
    offsets = cu_seqlens.tolist()
    by_length: dict[int, list[int]] = {}
    for start, end in pairwise(offsets):
        if end > start:
            by_length.setdefault(end - start, []).append(start)
    starts = torch.tensor([s for group in by_length.values() for s in group], device=qkv.device)
    lengths = torch.tensor([n for n, group in by_length.items() for _ in group], device=qkv.device)
    if not by_length:
        return qkv.flatten(1).narrow(1, 0, qkv.shape[-2] * qkv.shape[-1])
    # the tokens, sequences of one length behind each other
    first = lengths.cumsum(0) - lengths
    order = torch.arange(qkv.shape[0], device=qkv.device) + (starts - first).repeat_interleave(lengths)
    sorted_already = len(by_length) == 1
    if not sorted_already:
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(qkv.shape[0], device=qkv.device))
        qkv = _Permute.apply(qkv, order, inverse)
    parts = []
    for tokens, n in zip(qkv.split([n * len(g) for n, g in by_length.items()]), by_length, strict=True):
        query, key, value = tokens.unflatten(0, (-1, n)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    out = torch.cat(parts)
    return out if sorted_already else _Permute.apply(out, inverse, order)
