"""What the losses' autograd functions share: plans, features as kernels read them, and blocks of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from clipfast.ops.contrastive_kernels import Kernels, accumulation_dtype
from clipfast.ops.contrastive_narrow import narrowed
from clipfast.ops.contrastive_ranks import Ranks


class Plan(NamedTuple):
    """How a loss is computed: the kernels, the ranks (None for one process), and what the caller asked for.

    With ``arrived``, ``text`` are the texts of all ranks, and their gradients find the way back by themselves. With a
    ``dtype``, the kernels are given features in it, which came in the precision of sums to have gradients in that; with
    ``scaled`` each row is brought into its range by a power of two. ``extra_ranks`` and ``extra_learns`` are those of
    :class:`clipfast.ops.contrastive_arguments.Options`.
    """

    kernels: Kernels
    ranks: Ranks | None = None
    ring: bool = False
    normalize: bool = False
    arrived: bool = False
    dtype: torch.dtype | None = None
    scaled: bool = False
    extra_ranks: Ranks | None = None
    extra_learns: bool = True


def as_read(features: Tensor, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """Return features as the kernels read them, and the powers of two ``[B]`` that their rows were divided by."""
    if plan.dtype is None:
        return features, None
    return narrowed(features, plan.dtype) if plan.scaled else (features.to(plan.dtype), None)


def all_powers(powers: Tensor | None, plan: Plan) -> Tensor | None:
    """Return the powers of the texts of all ranks."""
    return powers if powers is None or plan.ranks is None or plan.arrived else plan.ranks.gather(powers)


def factor(features: Tensor, normalize: bool, powers: Tensor | None) -> Tensor | None:
    """Return what logits are multiplied by, ``[B]``: inverse norms, with the floor of ``F.normalize``, or powers."""
    if not normalize:
        return powers
    floor = 1e-12 if powers is None else 1e-12 / powers
    norms = torch.linalg.vector_norm(features, dim=1, dtype=accumulation_dtype(features.dtype))
    return norms.clamp_min(floor).reciprocal()


def through_factor(grad: Tensor, features: Tensor, normalize: bool, powers: Tensor | None) -> Tensor:
    """Turn the gradient of features as they were read, which counted their factor as a constant, into that of features.

    What only changes a feature's length is taken off, in place.
    """
    if normalize:
        inverse = factor(features, normalize, powers)
        # a few rows at a time: their products would be as large as the features
        pairs = zip(grad.split(1024), features.split(1024), strict=True)
        along = torch.cat([(a * b).sum(1, dtype=inverse.dtype) for a, b in pairs]) * inverse.square()
        # below the floor the norm is a constant, and so is the factor
        along = along.masked_fill(inverse >= (1e12 if powers is None else 1e12 * powers), 0)
        grad = grad.addcmul_(features.to(grad.dtype), along[:, None].to(grad.dtype), value=-1)
    return grad if powers is None else grad / powers[:, None]


def own(powers: Tensor | None, plan: Plan) -> Tensor | None:
    """Return the powers of the texts that gradients are of: this rank's, or all where the exchange brings them home."""
    return powers if powers is None or plan.ranks is None or plan.arrived else powers[plan.ranks.own]


Block = Callable[[Tensor, slice, int], tuple[Tensor, ...]]


def all_blocks(image: Tensor, text: Tensor, plan: Plan, block: Block) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return ``d_image``, this rank's ``d_text`` and texts, and the gradients of scalars.

    ``block(texts, columns, first_label)`` gives the gradients of this rank's rows with some of the columns.
    """
    ranks = plan.ranks
    if ranks is not None and plan.ring:
        d_image, d_text, scalars = _ring_gradients(image, text, plan, block)
        return d_image, d_text, text, scalars
    d_image, d_text, *scalars = block(text, slice(None), 0 if ranks is None else ranks.own.start)
    if ranks is None or plan.arrived:
        return d_image, d_text, text, scalars
    return d_image, ranks.reduce_scatter(d_text), text[ranks.own], scalars


def label_of(ranks: Ranks, owner: int) -> int:
    """Return where the labels of this rank's rows begin in the columns of ``owner``: at 0, or past the end."""
    return 0 if owner == ranks.rank else ranks.sizes[owner]


def _ring_gradients(image: Tensor, text: Tensor, plan: Plan, block: Block) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Add up the blocks of all ranks' texts; every rank's sums travel with its texts, in the precision of sums."""
    ranks, dtype = plan.ranks, accumulation_dtype(image.dtype)
    d_image = torch.zeros_like(image, dtype=dtype)
    scalars: list[Tensor] = []
    circling = ranks.carry(text, torch.zeros_like(text, dtype=dtype))
    for _ in ranks.sizes:
        owner, texts, sums = next(circling)
        of_image, of_text, *more = block(texts, ranks.rows(owner), label_of(ranks, owner))
        d_image += of_image
        sums += of_text
        scalars = [a + b for a, b in zip(scalars, more, strict=True)] if scalars else more
    _, _, home = next(circling)
    return d_image, home, scalars


def is_wide(plan: Plan, more: bool = False) -> bool:
    """Return whether kernels give features' gradients in the precision of sums: they came in it, or are added up."""
    return plan.dtype is not None or plan.ring or more
