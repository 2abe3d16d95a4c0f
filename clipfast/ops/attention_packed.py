"""Packed sequences by PyTorch's own attention: sequences of one length make one batch.

Sequences that come in order of their lengths, as the text tower packs them, are read in place; others are permuted
first.

How many there are of which length is data, which ``torch.compile`` cannot trace: while it does, the same code is an
operator to it. Its backward pass computes the forward pass again, which eager mode does not need to.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import transfer


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
    shortest = min(map(operator.sub, offsets[1:], offsets), default=least)
    if offsets[0] != 0 or offsets[-1] != total or shortest < least:
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


class _Known:
    """What is known of offsets since they were made, so that no layer has to find it out again."""

    def __init__(self, lengths: Tensor, total: int, on_device: Tensor | None) -> None:
        self.lengths, self.total, self.on_device = lengths, total, on_device

    @functools.cached_property
    def groups(self) -> Groups:
        counts = torch.unique_consecutive(self.lengths, return_counts=True)
        return Groups(list(zip(*(t.tolist() for t in counts), strict=True)), None, None)


def remember(cu_seqlens: Tensor, lengths: Tensor, total: int, on_device: Tensor | None = None) -> None:
    """Let every op that gets ``cu_seqlens`` find what is known of it: nothing is computed or sent to a device again.

    Args:
        cu_seqlens: Right offsets ``[S + 1]`` in host memory, which nobody writes to from now on.
        lengths: The sequences' lengths ``[S]``, ascending and none of them 0, in host memory.
        total: Their sum.
        on_device: The same offsets in int32 on a device.
    """
    cu_seqlens._clipfast_known = _Known(lengths, total, on_device)
    if on_device is not None:
        # for what computes in a kernel's place
        on_device._clipfast_known = _Known(lengths, total, None)


def _known(cu_seqlens: Tensor) -> _Known | None:
    # what is traced would be compiled anew for every batch
    return None if torch.compiler.is_compiling() else getattr(cu_seqlens, "_clipfast_known", None)


def check(cu_seqlens: Tensor, total: int, op: str = "attention", may_be_empty: bool = True) -> None:
    """Raise a ValueError in the name of ``op`` unless ``cu_seqlens`` are offsets of ``total`` tokens; reads them."""
    known = _known(cu_seqlens)
    check_offsets(cu_seqlens.tolist() if known is None else [0, known.total], total, op, may_be_empty)


def groups_of(cu_seqlens: Tensor, x: Tensor, op: str = "attention", may_be_empty: bool = True) -> Groups:
    """Return the groups of the sequences in ``x [total, ...]``, whose offsets are checked as by :func:`check`.

    Offsets that lie on a GPU are read back, which waits for it.
    """
    known = _known(cu_seqlens)
    if known is not None:
        check(cu_seqlens, x.shape[0], op, may_be_empty)
        return known.groups
    offsets = cu_seqlens.tolist()
    check_offsets(offsets, x.shape[0], op, may_be_empty)
    return group_by_length(offsets, x.device)


def on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    """Return offsets in int32 on ``device``, without waiting for it wherever they come from."""
    if cu_seqlens.device.type != "cpu" or device.type == "cpu":
        return cu_seqlens.to(device=device, dtype=torch.int32)
    if torch.compiler.is_compiling():
        return torch.ops.clipfast.offsets_on_device(cu_seqlens, device)
    known = _known(cu_seqlens)
    if known is not None and known.on_device is not None and known.on_device.device == device:
        return known.on_device
    return transfer.to_device(cu_seqlens.int(), device)


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
    # in host memory, whatever PyTorch's default device is
    sequences = torch.tensor([i for group in by_length.values() for i in group], device="cpu")
    lengths = torch.tensor([n for n, count in counts for _ in range(count)], device="cpu")
    # from where a token goes to where it comes from is as far as for its sequence's first
    moves = torch.tensor(starts, device="cpu")[sequences] - (lengths.cumsum(0) - lengths)
    tokens = torch.arange(offsets[-1], device="cpu") + moves.repeat_interleave(lengths)
    orders = transfer.together([tokens, _inverse(tokens), sequences, _inverse(sequences)], device)
    return Groups(counts, (orders[0], orders[1]), (orders[2], orders[3]))


def _inverse(order: Tensor) -> Tensor:
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


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
    groups = groups_of(cu_seqlens, qkv)
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
_library.define("offsets_on_device(Tensor cu_seqlens, Device device) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _forward(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    # an operator's result is memory of its own
    return _by_length(qkv, causal, cu_seqlens, scale).clone(memory_format=torch.contiguous_format)


def _backward(d_out: Tensor, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        out = _by_length(leaf, causal, cu_seqlens, scale)
    return torch.autograd.grad(out, leaf, d_out)[0].contiguous()


def _offsets_on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    # memory of its own here too: those that are known serve every layer
    return on_device(cu_seqlens, device).clone()


_library.impl("offsets_on_device", _offsets_on_device, "CPU")
for _device in ("CPU", "CUDA"):
    _library.impl("attention_by_length", _forward, _device)
    _library.impl("attention_by_length_backward", _backward, _device)


@torch.library.register_fake("clipfast::attention_by_length", lib=_library)
def _fake_forward(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


@torch.library.register_fake("clipfast::attention_by_length_backward", lib=_library)
def _fake_backward(d_out: Tensor, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape)


@torch.library.register_fake("clipfast::offsets_on_device", lib=_library)
def _fake_on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32, device=device)


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
