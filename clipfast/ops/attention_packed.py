"""Packed sequences by PyTorch's own attention, and what is known of their offsets.

On the CPU, sequences of one length make one batch: a call costs little there, and padding much. Those that come in
order of their lengths, as the text tower packs them, are read in place; others are permuted first. Elsewhere, where a
call is a launch, sequences are padded to a few lengths (:mod:`clipfast.ops.length_buckets`).

How many there are of which length is data, which ``torch.compile`` cannot trace: while it does, the same code is an
operator to it. Its backward pass computes the forward pass again, which eager mode does not need to.
"""

from __future__ import annotations

import functools
import operator as operators
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import length_buckets, switches, transfer
from clipfast.ops.length_buckets import Buckets


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
    shortest = min(map(operators.sub, offsets[1:], offsets), default=least)
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
        self._buckets: dict[tuple[torch.device, bool], Buckets] = {}

    @functools.cached_property
    def longest(self) -> int:
        return int(self.lengths[-1]) if self.lengths.numel() else 0

    def buckets(self, device: torch.device) -> Buckets:
        key = device, switches.is_deterministic()
        if key not in self._buckets:
            self._buckets[key] = length_buckets.make(self.lengths, device)
        return self._buckets[key]

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


def buckets_of(cu_seqlens: Tensor, x: Tensor, op: str = "attention", may_be_empty: bool = True) -> Buckets | None:
    """Return the buckets of the sequences in ``x [total, ...]``, as :func:`groups_of`; None without tokens."""
    lengths = _lengths_of(cu_seqlens, x.shape[0], op, may_be_empty)
    if not x.shape[0]:
        return None
    return lengths.buckets(x.device) if isinstance(lengths, _Known) else length_buckets.make(lengths, x.device)


def longest(cu_seqlens: Tensor, total: int, op: str = "attention", may_be_empty: bool = True) -> int:
    """Return the most tokens of a sequence, 0 where there are none; offsets are read and checked as elsewhere."""
    lengths = _lengths_of(cu_seqlens, total, op, may_be_empty)
    if not total:
        return 0
    return lengths.longest if isinstance(lengths, _Known) else int(lengths.max())


def _lengths_of(cu_seqlens: Tensor, total: int, op: str, may_be_empty: bool) -> Tensor | _Known:
    """Return the sequences' lengths in host memory, or what is known of them."""
    known = _known(cu_seqlens)
    host = None if known is not None else cu_seqlens.cpu().long()
    check_offsets([0, known.total] if known is not None else host.tolist(), total, op, may_be_empty)
    return host.diff() if known is None else known


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
    orders = transfer.together([tokens, inverse(tokens), sequences, inverse(sequences)], device)
    return Groups(counts, (orders[0], orders[1]), (orders[2], orders[3]))


def offsets_of(lengths: Tensor) -> Tensor:
    """Return the offsets ``[S + 1]`` of sequences of lengths ``[S]`` that are packed one behind the other."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes ``order``."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Return ``[total, H·D]`` from ``qkv [total, 3, H, D]`` and offsets ``cu_seqlens [S + 1]``."""
    if torch.compiler.is_compiling():
        return _traced(qkv, causal, cu_seqlens, scale)
    return _attention(qkv, causal, cu_seqlens, scale)


def _attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    run = _by_length if qkv.device.type == "cpu" else _in_buckets
    return run(qkv, causal, cu_seqlens, scale)


def _by_length(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Compute :func:`attention` by one call of ``scaled_dot_product_attention`` for every distinct length."""
    groups = groups_of(cu_seqlens, qkv)
    if not groups.counts:
        return qkv[:, 0].flatten(1)
    if groups.tokens is not None:
        qkv = permute(qkv, *groups.tokens)
    parts = []
    for tokens, (n, _) in zip(qkv.split([n * count for n, count in groups.counts]), groups.counts, strict=True):
        parts.append(_dense(tokens.unflatten(0, (-1, n)), None, causal, scale))
    out = torch.cat(parts)
    return out if groups.tokens is None else permute(out, *reversed(groups.tokens))


def _in_buckets(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Compute :func:`attention` by a few calls of ``scaled_dot_product_attention``, whatever the lengths are.

    Offsets on a GPU are read back, which waits for it.
    """
    buckets = buckets_of(cu_seqlens, qkv)
    if buckets is None:
        return qkv[:, 0].flatten(1)
    padded = buckets.split(length_buckets.pad(qkv, buckets))
    # what comes behind a token is hidden from it as it is
    masks = [None] * len(padded) if causal else buckets.masks()
    parts = [_dense(tokens, mask, causal, scale) for tokens, mask in zip(padded, masks, strict=True)]
    return length_buckets.unpad(torch.cat(parts) if len(parts) > 1 else parts[0], buckets)


def _dense(qkv: Tensor, mask: Tensor | None, causal: bool, scale: float) -> Tensor:
    """Return ``[S · N, H·D]`` from ``qkv [S, N, 3, H, D]``."""
    # as in attention_torch.py: what SDPA gives back needs no copy
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


_library = torch.library.Library("clipfast", "FRAGMENT")
_library.define("offsets_on_device(Tensor cu_seqlens, Device device) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _offsets_on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    # memory of its own here too: those that are known serve every layer
    return on_device(cu_seqlens, device).clone()


@torch.library.register_fake("clipfast::offsets_on_device", lib=_library)
def _fake_on_device(cu_seqlens: Tensor, device: torch.device) -> Tensor:
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32, device=device)


_library.impl("offsets_on_device", _offsets_on_device, "CPU")


def operator(name: str, compute: Callable[[Tensor, bool, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """Define an operator that a compiler need not look into, with gradients, and return what calls it.

    Args:
        name: Of the operator; that of its backward pass is ``name_backward``.
        compute: What it computes, with the arguments of :func:`attention`.
    """
    arguments = "Tensor qkv, bool causal, Tensor cu_seqlens, float scale) -> Tensor"

    def forward(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
        # an operator's result is memory of its own
        return compute(qkv, causal, cu_seqlens, scale).clone(memory_format=torch.contiguous_format)

    def backward(d_out: Tensor, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
        with torch.enable_grad():
            leaf = qkv.detach().requires_grad_()
            out = compute(leaf, causal, cu_seqlens, scale)
        return torch.autograd.grad(out, leaf, d_out)[0].contiguous()

    def fake_forward(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
        return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])

    def fake_backward(d_out: Tensor, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
        return qkv.new_empty(qkv.shape)

    for operator, signature, run, fake in (
        (name, arguments, forward, fake_forward),
        (f"{name}_backward", f"Tensor d_out, {arguments}", backward, fake_backward),
    ):
        _library.define(f"{operator}({signature}", tags=torch.Tag.pt2_compliant_tag)
        for device in ("CPU", "CUDA"):
            _library.impl(operator, run, device)
        torch.library.register_fake(f"clipfast::{operator}", fake, lib=_library)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: FunctionCtx, qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
            ctx.save_for_backward(qkv, cu_seqlens)
            ctx.causal, ctx.scale = causal, scale
            return getattr(torch.ops.clipfast, name)(qkv, causal, cu_seqlens, scale)

        @staticmethod
        def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
            qkv, cu_seqlens = ctx.saved_tensors
            again = getattr(torch.ops.clipfast, f"{name}_backward")
            return again(d_out, qkv, ctx.causal, cu_seqlens, ctx.scale), None, None, None

    return Differentiable.apply


_traced = operator("attention_by_length", _attention)
