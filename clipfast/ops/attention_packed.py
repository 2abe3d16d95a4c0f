"""Packed sequences by PyTorch's own attention: sequences of one length make one batch.

Sequences that come in order of their lengths, as the text tower packs them, are read in place; others are permuted
first.

How many there are of which length is data, which ``torch.compile`` cannot trace: while it does, the same code is an
operator to it. Its backward pass computes the forward pass again, which eager mode does not need to.
"""

from __future__ import annotations

from dataclasses import dataclass
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


def permute(x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Return ``x[order]`` for a permutation and its inverse."""
    return _Permute.apply(x, order, inverse)


def check_offsets(offsets: list[int], total: int, op: str = "attention", may_be_empty: bool = True) -> None:
    """Raise a ValueError in the name of ``op`` unless ``offsets`` start at 0, never decrease and end at ``total``.

    Two that are equal leave a sequence empty, which not every op allows.
    """
    least = 0 if may_be_empty else 1
    if offsets[0] != 0 or offsets[-1] != total or any(b - a < least for a, b in pairwise(offsets)):
        raise ValueError(
            f"{op}(cu_seqlens): got {offsets[0]} … {offsets[-1]}, expected offsets that start at 0, never "
            f"decrease and end at the {total} packed tokens{'' if may_be_empty else ', and leave no sequence empty'}"
        )


@dataclass(frozen=True)
class Groups:
    """Packed sequences by their length.

    Attributes:
        counts: ``(n, count)`` for every distinct length n > 0: that many sequences have it.
        tokens: The permutation (and its inverse) that puts the tokens of one length behind each other, in the order
            of ``counts``; None where they lie so.
        sequences: The same for the sequences themselves, empty ones left out.
    """

    counts: list[tuple[int, int]]
    tokens: tuple[Tensor, Tensor] | None
    sequences: tuple[Tensor, Tensor] | None


def group_by_length(offsets: list[int], device: torch.device) -> Groups:
    """Return the groups of sequences that lie between ``offsets``; the permutations lie on ``device``."""
    by_length: dict[int, list[int]] = {}
    starts: list[int] = []
    last, sorted_already = 0, True
    for start, end in pairwise(offsets):
        if end > start:
            # not where a length comes back after another one
            sorted_already &= end - start == last or end - start not in by_length
            last = end - start
            by_length.setdefault(last, []).append(len(starts))
            starts.append(start)
    counts = [(n, len(group)) for n, group in by_length.items()]
    if sorted_already:
        return Groups(counts, None, None)
    sequences = torch.tensor([i for group in by_length.values() for i in group], device="cpu")
    lengths = torch.tensor([n for n, count in counts for _ in range(count)], device="cpu")
    # from where a token goes to where it comes from is as far as for its sequence's first
    moves = torch.tensor(starts, device="cpu")[sequences] - (lengths.cumsum(0) - lengths)
    tokens = torch.arange(offsets[-1], device="cpu") + moves.repeat_interleave(lengths)
    return Groups(counts, _with_inverse(tokens, device), _with_inverse(sequences, device))


def _with_inverse(order: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    return order.to(device), inverse.to(device)


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Return ``[total, H·D]`` from ``qkv [total, 3, H, D]`` and offsets ``cu_seqlens [S + 1]``."""
    if torch.compiler.is_compiling():
        return _Operator.apply(qkv, causal, cu_seqlens, scale)
    return _by_length(qkv, causal, cu_seqlens, scale)


def _by_length(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Compute :func:`attention`.

    One call of ``scaled_dot_product_attention`` for every distinct length: captions have a few dozen of them, however
    many captions there are. Offsets on a GPU are read back, which waits for it.
    """
    offsets = cu_seqlens.tolist()
    check_offsets(offsets, qkv.shape[0])
    groups = group_by_length(offsets, qkv.device)
    if not groups.counts:
        return qkv[:, 0].flatten(1)
    if groups.tokens is not None:
        qkv = permute(qkv, *groups.tokens)
    parts = []
    for tokens, (n, _) in zip(qkv.split([n * count for n, count in groups.counts]), groups.counts, strict=True):
        query, key, value = tokens.unflatten(0, (-1, n)).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
        parts.append(out.transpose(1, 2).flatten(2).flatten(0, 1))
    out = torch.cat(parts)
    return out if groups.tokens is None else permute(out, *reversed(groups.tokens))


_library = torch.library.Library("clipfast", "FRAGMENT")
_library.define(
    "attention_by_length(Tensor qkv, bool causal, Tensor cu_seqlens, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "attention_by_length_backward(Tensor d_out, Tensor qkv, bool causal, Tensor cu_seqlens, float scale) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    # an operator's result is memory of its own
    return _by_length(qkv, causal, cu_seqlens, scale).clone(memory_format=torch.contiguous_format)


def _backward(d_out: Tensor, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        out = _by_length(leaf, causal, cu_seqlens, scale)
    return torch.autograd.grad(out, leaf, d_out)[0].contiguous()


for _device in ("CPU", "CUDA"):
    _library.impl("attention_by_length", _forward, _device)
    _library.impl("attention_by_length_backward", _backward, _device)


@torch.library.register_fake("clipfast::attention_by_length", lib=_library)
def _fake_forward(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


@torch.library.register_fake("clipfast::attention_by_length_backward", lib=_library)
def _fake_backward(d_out: Tensor, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


class _Operator(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens)
        ctx.causal, ctx.scale = causal, scale
        return torch.ops.clipfast.attention_by_length(qkv, causal, cu_seqlens, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens = ctx.saved_tensors
        gradient = torch.ops.clipfast.attention_by_length_backward(d_out, qkv, ctx.causal, cu_seqlens, ctx.scale)
        return gradient, None, None, None
