"""Targets that are more than each row's own pair, as corrections of O(B·D) to the loss that has only that.

A row's cross-entropy with any target ``q`` is its log-sum-exp less ``Σⱼ qⱼ·sᵢⱼ``. The tiles give it for a target that
is the pair alone. What is left is ``s·Iᵢ·(Tᵢ − Σⱼ qⱼ·Tⱼ)``, and ``Σⱼ qⱼ·Tⱼ`` is a mean of features: of those of a
group, of all for smoothed labels. No B×B matrix is needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast.ops.contrastive_arguments import Options
from clipfast.ops.contrastive_ranks import Ranks


def corrections(image: Tensor, text: Tensor, extra: Tensor | None, options: Options) -> Tensor:
    """Return what each pair's loss changes by, over the scale ``s``: ``[b]``.

    Args:
        image: This rank's ``[b, D]``, as the logits are made of them, in the precision of sums.
        text: This rank's ``[b, D]``.
        extra: This rank's ``[m, D]``, columns of the images' rows, or None.
        options: The smoothing, the groups, and the ranks.
    """
    away_from_text, away_from_image = torch.zeros_like(image), torch.zeros_like(text)
    of_texts, of_images = text, image
    if options.groups is not None:
        members = _Members(options.groups, options.ranks)
        ring = options.comm == "ring"
        of_texts, of_images = (members.means(x, ring) for x in (text, image))
        away_from_text, away_from_image = text - of_texts, image - of_images
    smoothing = options.label_smoothing
    if smoothing:
        batch = image.shape[0] if options.ranks is None else options.ranks.total
        texts, columns = text.sum(0), batch
        if extra is not None:
            texts = texts + extra.sum(0)
            columns += extra.shape[0] if options.extra_ranks is None else options.extra_ranks.total
        images = image.sum(0)
        if options.ranks is not None:
            texts, images = joined_sum(texts, options.ranks), joined_sum(images, options.ranks)
        away_from_text = away_from_text + smoothing * (of_texts - texts / columns)
        away_from_image = away_from_image + smoothing * (of_images - images / batch)
    return ((image * away_from_text).sum(1) + (text * away_from_image).sum(1)) / 2


def joined_sum(x: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the sum of ``x`` over ranks, the same on each, with the gradients that each asks for."""
    return x if ranks is None else _JoinedSum.apply(x, ranks)


class _JoinedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(grad), None


class _Members:
    """Which pairs of a joined batch belong together, as one rank sees it.

    Groups are counted by where their ids stand among this rank's, sorted: places that nobody has to wait for, unlike
    ``torch.unique``'s number of them.
    """

    def __init__(self, ids: Tensor, ranks: Ranks | None) -> None:
        ids = ids.long()
        joined = ids if ranks is None else ranks.gather(ids)
        here, everywhere = ids.sort().values, joined.sort().values
        self.ranks = ranks
        self.own = torch.searchsorted(here, ids)
        places = torch.searchsorted(here, joined).clamp_max(len(ids) - 1)
        # past the end: this rank has no pair of that group
        self.places = torch.where(here[places] == joined, places, len(ids))
        self.counts = torch.searchsorted(everywhere, ids, right=True) - torch.searchsorted(everywhere, ids)

    def means(self, x: Tensor, ring: bool) -> Tensor:
        """Return the mean over each of this rank's pairs' group ``[b, D]``, of the ``[b, D]`` of all ranks."""
        return _GroupMeans.apply(x, self.own, self.places, self.counts, self.ranks, ring)


class _GroupMeans(torch.autograd.Function):
    """A product with a symmetric matrix: 1 over a group's size between its members, 0 elsewhere."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, own: Tensor, places: Tensor, counts: Tensor, ranks: Ranks | None, ring: bool
    ) -> Tensor:
        ctx.save_for_backward(own, places, counts)
        ctx.ranks, ctx.ring = ranks, ring
        return _group_means(x, own, places, counts, ranks, ring)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _group_means(grad, *ctx.saved_tensors, ctx.ranks, ctx.ring), None, None, None, None, None


def _group_means(x: Tensor, own: Tensor, places: Tensor, counts: Tensor, ranks: Ranks | None, ring: bool) -> Tensor:
    groups = x.shape[0] + 1
    if ranks is None or not ring:
        sums = _sums_at(x if ranks is None else ranks.gather(x), places, groups)
    else:
        sums = x.new_zeros(groups, x.shape[1])
        for owner, rows in ranks.visit(x.contiguous()):
            sums += _sums_at(rows, places[ranks.rows(owner)], groups)
    return sums[own] / counts[:, None]


def _sums_at(rows: Tensor, places: Tensor, count: int) -> Tensor:
    """Add rows ``[n, D]`` up at their places, ``[count, D]``: an embedding's backward, whose order of sums is fixed."""
    return torch.ops.aten.embedding_dense_backward(rows.contiguous(), places, count, -1, False)
