"""What travels between ranks for the contrastive losses: one tower's features, and O(B) statistics.

Every rank holds its images against all texts. Rows of logits are then complete on their rank; columns are joined by one
reduction of a number a text. In the backward pass the images' gradients are complete at once, and the texts' are one
reduce-scatter, or travel around the ring with their texts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast.ops.contrastive_narrow import narrowed, tile_dtype, widened

# PyTorch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Ranks:
    """The ranks of a group and how many rows each holds."""

    group: dist.ProcessGroup
    sizes: tuple[int, ...]

    @property
    def rank(self) -> int:
        """This rank, within the group."""
        return dist.get_rank(self.group)

    @property
    def total(self) -> int:
        """The rows of the joined batch."""
        return sum(self.sizes)

    def rows(self, rank: int) -> slice:
        """Return where a rank's rows lie in the joined batch."""
        first = sum(self.sizes[:rank])
        return slice(first, first + self.sizes[rank])

    @property
    def own(self) -> slice:
        """Where this rank's rows lie in the joined batch."""
        return self.rows(self.rank)

    def gather(self, x: Tensor) -> Tensor:
        """Join the rows ``[b, ...]`` of all ranks to ``[B, ...]``."""
        if self._equal:
            out = x.new_empty(self.total, *x.shape[1:])
            _all_gather(out, x.contiguous(), group=self.group)
            return out
        parts = [x.new_empty(max(self.sizes), *x.shape[1:]) for _ in self.sizes]
        dist.all_gather(parts, self._padded(x), group=self.group)
        return _joined([part[:size] for part, size in zip(parts, self.sizes, strict=True)])

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Sum ``[B, ...]`` over ranks and return this rank's rows ``[b, ...]``."""
        out = x.new_empty(max(self.sizes), *x.shape[1:])
        if self._equal:
            _reduce_scatter(out, x.contiguous(), group=self.group)
            return out
        parts = [self._padded(x[self.rows(rank)]) for rank in range(len(self.sizes))]
        dist.reduce_scatter(out, parts, group=self.group)
        return out[: self.sizes[self.rank]]

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of ``x`` over ranks."""
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """Return the largest of ``x`` over ranks."""
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def join_lse(self, x: Tensor) -> Tensor:
        """Join the log-sum-exps ``[2, N]`` of disjoint terms, as ``join_lse`` does for two of them."""
        most = self.max(x[0])
        return torch.stack([most, self.sum((x[0] - most + x[1]).exp()).log()])

    def visit(self, x: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(rank, its rows)`` for every rank, this one first; the next rows arrive meanwhile."""
        owner = self.rank
        for step in range(len(self.sizes)):
            following = (owner - 1) % len(self.sizes)
            arriving, waiting = ((x,), []) if step == len(self.sizes) - 1 else self._pass_on((x,), following)
            yield owner, x
            for work in waiting:
                work.wait()
            (x,), owner = arriving, following

    def carry(self, x: Tensor, sums: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield ``(rank, its rows, its sums)`` for every rank, this one first and, with all that was added, last.

        ``sums`` are the caller's to change in place before the next step.
        """
        owner = self.rank
        for _ in self.sizes:
            yield owner, x, sums
            owner = (owner - 1) % len(self.sizes)
            arriving, waiting = self._pass_on((x, sums), owner)
            for work in waiting:
                work.wait()
            x, sums = arriving
        yield owner, x, sums

    @property
    def _equal(self) -> bool:
        return len(set(self.sizes)) == 1

    def _pass_on(self, leaving: tuple[Tensor, ...], following: int) -> tuple[tuple[Tensor, ...], list[dist.Work]]:
        """Send to the next rank; receive what belongs to rank ``following`` from the one before."""
        world, rank = len(self.sizes), self.rank
        if world == 1:
            return leaving, []
        peers = [dist.get_global_rank(self.group, (rank + step) % world) for step in (1, -1)]
        arriving = tuple(t.new_empty(self.sizes[following], *t.shape[1:]) for t in leaving)
        sends = [dist.P2POp(dist.isend, t.contiguous(), peers[0], self.group) for t in leaving]
        receives = [dist.P2POp(dist.irecv, t, peers[1], self.group) for t in arriving]
        return arriving, dist.batch_isend_irecv(sends + receives)

    def _padded(self, x: Tensor) -> Tensor:
        missing = max(self.sizes) - x.shape[0]
        return _joined([x, x.new_zeros(missing, *x.shape[1:])]) if missing else x.contiguous()


class TextExchange:
    """Texts on their way to all ranks, and their gradients on their way back, while other work goes on.

    See :func:`send_texts`. One exchange serves one loss. Where the loss's tiles would round float32 texts to 16 bits,
    they travel in these, and arrive in float32 as the tiles hold them; gradients travel in float32.

    Attributes:
        ranks: The ranks and how many rows each holds.
    """

    def __init__(self, text: Tensor, ranks: Ranks) -> None:
        self.ranks = ranks
        self._returning: tuple[Tensor, dist.Work] | None = None
        self._powers: Tensor | None = None
        self._leaving, self._sent = _Send.apply(text, self), True

    def arrive(self) -> Tensor:
        """Wait for the texts of all ranks, ``[B, D]``.

        Raises:
            RuntimeError: They have arrived before.
        """
        if not self._sent:
            raise RuntimeError("contrastive_loss(comm): got an exchange that a loss has used, expected a new one")
        self._sent = False
        return _Arrive.apply(self._leaving, self)


class _Send(torch.autograd.Function):
    """Forward, texts leave; backward, which runs last of all that came after, their gradients are back."""

    @staticmethod
    def forward(ctx: Any, text: Tensor, exchange: TextExchange) -> Tensor:
        ctx.exchange, ranks = exchange, exchange.ranks
        dtype = tile_dtype(text)
        parts = (text.detach(),) if dtype is None else narrowed(text.detach(), dtype)
        # rows up to the longest batch of all: what is padding is cut when it has arrived
        rows = len(ranks.sizes) * max(ranks.sizes)
        gathered = [part.new_empty(rows, *part.shape[1:]) for part in parts]
        exchange._work = [
            _all_gather(out, ranks._padded(part), group=ranks.group, async_op=True)
            for out, part in zip(gathered, parts, strict=True)
        ]
        exchange._powers = None if dtype is None else gathered[1]
        return gathered[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        out, work = ctx.exchange._returning
        ctx.exchange._returning = None
        work.wait()
        ranks = ctx.exchange.ranks
        return out[: ranks.sizes[ranks.rank]], None


class _Arrive(torch.autograd.Function):
    """Forward, texts are there; backward, which runs first, their gradients leave."""

    @staticmethod
    def forward(ctx: Any, leaving: Tensor, exchange: TextExchange) -> Tensor:
        for work in exchange._work:
            work.wait()
        ctx.exchange, ranks, ctx.dtype = exchange, exchange.ranks, leaving.dtype
        if exchange._powers is not None:
            leaving = widened(leaving, exchange._powers)
        elif ranks._equal:
            return leaving.view_as(leaving)
        if ranks._equal:
            return leaving
        return _joined([part[:size] for part, size in zip(leaving.split(max(ranks.sizes)), ranks.sizes, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange, ranks = ctx.exchange, ctx.exchange.ranks
        if not ranks._equal:
            grad = _joined([ranks._padded(grad[ranks.rows(rank)]) for rank in range(len(ranks.sizes))])
        out = grad.new_empty(max(ranks.sizes), *grad.shape[1:])
        grad = grad.contiguous()
        exchange._returning = out, _reduce_scatter(out, grad, group=ranks.group, async_op=True)
        # what _Send returns comes from the exchange; this only tells autograd the way
        return grad if grad.dtype == ctx.dtype else grad.new_zeros((), dtype=ctx.dtype).expand_as(grad), None


def _joined(parts: list[Tensor]) -> Tensor:
    """Return ``torch.cat(parts)``, also of float16 under autocast to bfloat16, which has no place for it."""
    with torch.autocast(parts[0].device.type, enabled=False):
        return torch.cat(parts)


def meet(
    image: Tensor,
    text: Tensor,
    group: dist.ProcessGroup,
    *,
    equal_batches: bool,
    problem: Exception | None,
    given: tuple[str, ...] = (),
) -> Ranks:
    """Learn what every rank holds: a batch that does not fit is an error on all of them, and none waits forever.

    Args:
        image: This rank's features ``[b, D]``.
        text: This rank's features ``[b, D]``.
        group: The process group.
        equal_batches: The caller's promise that all ranks hold as much as this one; nothing is exchanged then.
        problem: What is wrong on this rank already.
        given: Which of the arguments that make ranks exchange more came, of ``("groups", "extra")``.

    Raises:
        ValueError: A rank has an empty batch, another width or dtype, was given other arguments, or has something wrong
            of its own.
    """
    world = dist.get_world_size(group)
    if equal_batches:
        if problem is not None:
            raise problem
        return Ranks(group, (image.shape[0],) * world)
    code = ("groups" in given) + 2 * ("extra" in given)
    facts = [-1] * 4
    if problem is None:
        # the dtype that travels: on a rank without autocast it would be another
        facts = [*image.shape, _DTYPES.index(tile_dtype(image) or image.dtype), code]
    mine = torch.tensor(facts, device=image.device)
    gathered = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(gathered, mine, group=group)
    if problem is not None:
        raise problem
    # one wait for the device; `equal_batches` spares it
    facts_of = torch.stack(gathered).tolist()
    for rank, (size, width, dtype, other_code) in enumerate(facts_of):
        if size < 1:
            raise ValueError(
                f"contrastive_loss(image_features): rank {rank} cannot take part (an empty batch or wrong features), "
                f"expected at least 1 row on every rank"
            )
        if other_code != code:
            raise ValueError(
                f"contrastive_loss(groups, extra_text_features): got one of them on rank {rank} or on this one and not "
                f"on the other, expected the same arguments on all; a rank without extra texts brings [0, D]"
            )
        if (width, dtype) != tuple(facts_of[0][1:3]):
            raise ValueError(
                f"contrastive_loss(image_features): got width {width} and {_DTYPES[dtype]} on rank {rank}, expected "
                f"{facts_of[0][1]} and {_DTYPES[facts_of[0][2]]}, as on rank 0"
            )
    return Ranks(group, tuple(size for size, *_ in facts_of))


def meet_extra(extra: Tensor, ranks: Ranks, *, equal_batches: bool) -> tuple[Ranks, bool]:
    """Learn how many extra texts ``[m, D]`` every rank brings (m may be 0), and whether any of them wants gradients."""
    learns = extra.requires_grad and torch.is_grad_enabled()
    if equal_batches:
        return Ranks(ranks.group, (extra.shape[0],) * len(ranks.sizes)), learns
    mine = torch.tensor([extra.shape[0], learns], device=extra.device)
    gathered = [torch.empty_like(mine) for _ in ranks.sizes]
    dist.all_gather(gathered, mine, group=ranks.group)
    facts = torch.stack(gathered).tolist()
    return Ranks(ranks.group, tuple(size for size, _ in facts)), any(wants for _, wants in facts)
