"""Packed sequences in a few buckets: a launch a bucket, where one for every distinct length would be a launch for each.

The sequences of a bucket are padded to its longest, with tokens of their own that a mask hides: causal attention hides
whatever comes later, and other attention gets a mask of its own. Nothing else changes, so that results are those of
each sequence alone but for the order in which a kernel adds up.

A gather makes the padded sequences and another takes the padding out again. What both read is worked out on the host,
from lengths that it knows, and goes to the device in one copy.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from clipfast.ops import switches, transfer

MOST = 4

# What another bucket has to save, in padded tokens. It costs four launches (attention and the gradients' stack, forward
# and backward, and a copy) at 5 µs; a padded token of 512 channels about 100 bytes a channel (36 values in 16 bits,
# fewer in inference, more in float32) at 3.0 TB/s: 17 ns. So 20 µs are 1,200 tokens.
_WORTH = 1024

# distinct lengths that are considered as bounds; captions have 77 at the most
_CANDIDATES = 128


class Bucket(NamedTuple):
    """``count`` sequences that are padded to ``length``, all of them ``full`` where none is shorter."""

    length: int
    count: int
    full: bool


@dataclass(frozen=True)
class Buckets:
    """Packed sequences in buckets, the shortest first.

    Attributes:
        sizes: The buckets.
        pad: ``[padded]``: the packed token that each padded one is, or repeats.
        unpad: ``[total]``: where each packed token lies among the padded ones.
        lengths: ``[S]``: the sequences' lengths, in the order of the buckets.
        sequences: ``[S]``: which of the packed sequences each of the buckets' is, and the inverse; None where
            they lie in this order. Empty ones are left out.
    """

    sizes: list[Bucket]
    pad: Tensor
    unpad: Tensor
    lengths: Tensor
    sequences: tuple[Tensor, Tensor] | None

    def split(self, padded: Tensor) -> list[Tensor]:
        """Return ``[count, length, ...]`` for every bucket of ``[padded, ...]``."""
        if len(self.sizes) == 1:
            return [padded.unflatten(0, (self.sizes[0].count, self.sizes[0].length))]
        parts = padded.split([b.length * b.count for b in self.sizes])
        return [part.unflatten(0, (b.count, b.length)) for part, b in zip(parts, self.sizes, strict=True)]

    def masks(self) -> list[Tensor | None]:
        """Return ``[count, 1, 1, length]`` for every bucket, whether a key is no padding; None where none is."""
        starts = [0, *itertools.accumulate(b.count for b in self.sizes)]
        return [None if b.full else _mask(self.lengths[s : s + b.count], b) for s, b in zip(starts, self.sizes)]  # noqa: B905


def _mask(lengths: Tensor, bucket: Bucket) -> Tensor:
    return (torch.arange(bucket.length, device=lengths.device) < lengths[:, None])[:, None, None]


def make(lengths: Tensor, device: torch.device) -> Buckets:
    """Return buckets of packed sequences.

    Args:
        lengths: ``[S]`` int64 in host memory, in the order in which the sequences are packed, one of them not 0.
        device: Where the tensors of the result are to be.

    Returns:
        :data:`MOST` buckets at the most, and no more than their launches are worth. Where results may not depend on
        the batch (``deterministic()``), a sequence is padded to the next power of 2, in whichever company.
    """
    ends = lengths.cumsum(0)
    starts = ends - lengths
    ordered, order = lengths.sort(stable=True)
    if int(ordered[0]) == 0:
        kept = ordered > 0
        ordered, order = ordered[kept], order[kept]
    in_order = len(order) == len(lengths) and torch.equal(order, torch.arange(len(order), device="cpu"))
    distinct, counts = ordered.unique_consecutive(return_counts=True)
    if switches.is_deterministic():
        bounds, into = (2 ** distinct.double().log2().ceil()).long().unique_consecutive(return_inverse=True)
        sizes = torch.zeros_like(bounds).index_add_(0, into, counts)
        chosen = list(zip(bounds.tolist(), sizes.tolist(), strict=True))
    else:
        chosen = choose(distinct, counts)
    buckets, pads, first, base = [], [], 0, 0
    places = torch.empty(int(ends[-1]), dtype=torch.int64, device="cpu")
    for length, count in chosen:
        mine, of = ordered[first : first + count], order[first : first + count]
        position = torch.arange(length, device="cpu")
        # a padded token is the sequence's last one again: something finite
        rows = starts[of, None] + torch.minimum(position, mine[:, None] - 1)
        own = position < mine[:, None]
        places[rows[own]] = base + own.flatten().nonzero().flatten()
        pads.append(rows.flatten())
        buckets.append(Bucket(length, count, int(mine[0]) == length))
        first, base = first + count, base + count * length
    parts = [torch.cat(pads), places, ordered]
    if not in_order:
        parts += [order, torch.zeros_like(lengths).scatter_(0, order, torch.arange(len(order), device="cpu"))]
    pad, unpad, there, *orders = transfer.together(parts, device)
    return Buckets(buckets, pad, unpad, there, tuple(orders) if orders else None)


def choose(lengths: Tensor, counts: Tensor) -> list[tuple[int, int]]:
    """Return ``(length, sequences)`` of buckets that pad the least for their number.

    Args:
        lengths: The distinct lengths, ascending, in host memory.
        counts: How many sequences have each.
    """
    if len(lengths) > _CANDIDATES:
        # every so many of them, the longest for certain
        last = torch.linspace(0, len(lengths) - 1, _CANDIDATES + 1, device="cpu")[1:].long()
        before = counts.cumsum(0)[last]
        lengths, counts = lengths[last], before.diff(prepend=before.new_zeros(1))
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    # [i, j]: the tokens of a bucket of the lengths i to j, and more than any where there is none
    tokens = (lengths * (below[1:] - below[:-1, None])).double()
    tokens.masked_fill_(torch.ones_like(tokens, dtype=torch.bool).tril_(-1), torch.inf)
    # [j]: the fewest padded tokens of the lengths up to j, and where the last bucket of these begins
    fewest, begins = tokens[0], []
    best, buckets = float(fewest[-1]), 1
    for number in range(2, min(MOST, len(lengths)) + 1):
        before = torch.cat([fewest.new_full((1,), torch.inf), fewest[:-1]])
        fewest, begin = (before[:, None] + tokens).min(0)
        begins.append(begin)
        if float(fewest[-1]) + _WORTH * (number - buckets) < best:
            best, buckets = float(fewest[-1]), number
    found, end = [], len(lengths)
    for begin in reversed([None, *begins[: buckets - 1]]):
        start = 0 if begin is None else int(begin[end - 1])
        found.append((int(lengths[end - 1]), int(below[end] - below[start])))
        end = start
    return found[::-1]


# twice: as a permutation in forward, and another derivative
class _Pad(torch.autograd.Function):
    """``x[pad]`` whose gradient leaves out the padding: nothing that is kept depends on it, so its own is zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(pad, unpad)
        return x.index_select(0, pad)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pad, unpad = ctx.saved_tensors
        return _Unpad.apply(gradient, pad, unpad), None, None


class _Unpad(torch.autograd.Function):
    """``x[unpad]``; the gradient of the padding is zero."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, pad: Tensor, unpad: Tensor) -> Tensor:
        ctx.save_for_backward(unpad)
        ctx.rows = x.shape[0]
        return x.index_select(0, unpad)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (unpad,) = ctx.saved_tensors
        padded = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        return padded.index_copy_(0, unpad, gradient), None, None


def pad(x: Tensor, buckets: Buckets) -> Tensor:
    """Return ``[padded, ...]`` from ``[total, ...]``."""
    return _Pad.apply(x, buckets.pad, buckets.unpad)


def unpad(x: Tensor, buckets: Buckets) -> Tensor:
    """Return ``[total, ...]`` from ``[padded, ...]``, whose padding nothing depends on from here."""
    return _Unpad.apply(x, buckets.pad, buckets.unpad)
