"""The contrastive losses from tile kernels, on one rank or several, with their gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast.ops.contrastive_kernels import Kernels, accumulation_dtype, join_lse
from clipfast.ops.contrastive_ranks import Ranks


class Plan(NamedTuple):
    """How a loss is computed: the kernels, the ranks (None for one process), and what the caller asked for.

    With ``arrived``, ``text`` are the texts of all ranks, and their gradients find the way back by themselves. With a
    ``dtype``, the kernels are given features in it, which came in the precision of sums to have gradients in that.
    ``extra_ranks`` and ``extra_learns`` are those of :class:`clipfast.ops.contrastive_arguments.Options`.
    """

    kernels: Kernels
    ranks: Ranks | None = None
    ring: bool = False
    normalize: bool = False
    arrived: bool = False
    dtype: torch.dtype | None = None
    extra_ranks: Ranks | None = None
    extra_learns: bool = True


def contrastive_losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan, extra: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's loss ``[b]`` and whether each image and each text finds its own first (bool ``[b]``).

    ``extra`` are this rank's texts ``[m, D]`` beside the pairs: columns that images are held against, without a row.
    """
    return _Contrastive.apply(image, text, extra, logit_scale, plan)


def siglip_losses(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
    """Return each image's loss ``[b]``, summed over all texts."""
    return _SigLip.apply(image, text, logit_scale, logit_bias, plan)


def joined_mean(losses: Tensor, ranks: Ranks | None) -> Tensor:
    """Return the mean over the joined batch, the same on every rank."""
    return losses.mean() if ranks is None else _JoinedMean.apply(losses, ranks)


class _JoinedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(losses.sum()) / ranks.total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # every rank's result depends on every rank's losses
        ranks = ctx.ranks
        return (ranks.sum(grad) / ranks.total).expand(ranks.sizes[ranks.rank]), None


def _factor(features: Tensor, normalize: bool) -> Tensor | None:
    """Return the inverse norms ``[B]`` by which logits are normalised, with the floor of ``F.normalize``."""
    if not normalize:
        return None
    norms = torch.linalg.vector_norm(features, dim=1, dtype=accumulation_dtype(features.dtype))
    return norms.clamp_min(1e-12).reciprocal()


def _through_norm(grad: Tensor, features: Tensor, normalize: bool) -> Tensor:
    """Take off, in place, what only changes a feature's length; ``grad`` counted its inverse norm as a constant."""
    factor = _factor(features, normalize)
    if factor is None:
        return grad
    # a few rows at a time: their products would be as large as the features
    pairs = zip(grad.split(1024), features.split(1024), strict=True)
    along = torch.cat([(a * b).sum(1, dtype=factor.dtype) for a, b in pairs]) * factor.square()
    # below the floor the norm is a constant, and so is the factor
    along = along.masked_fill(factor >= 1e12, 0)
    return grad.addcmul_(features, along[:, None].to(grad.dtype), value=-1)


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, extra: Tensor | None, logit_scale: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [None if x is None else x.dtype for x in (image, text, extra)]
        if plan.dtype is not None:
            image, text, extra = (None if x is None else x.to(plan.dtype) for x in (image, text, extra))
        ranks = plan.ranks
        if ranks is None:
            others = text
            statistics = plan.kernels.statistics(
                image, text, logit_scale, _factor(image, plan.normalize), _factor(text, plan.normalize), 0
            )
        elif plan.ring:
            others = text
            statistics = _ring_statistics(image, text, logit_scale, plan)
        else:
            others = text if plan.arrived else ranks.gather(text)
            statistics = plan.kernels.statistics(
                image,
                others,
                logit_scale,
                _factor(image, plan.normalize),
                _factor(others, plan.normalize),
                ranks.own.start,
            )
        row_lse, col_lse, positive, row_rival, col_rival = statistics
        own = slice(0, image.shape[0])
        if ranks is not None:
            col_lse, col_rival, own = ranks.join_lse(col_lse), ranks.max(col_rival), ranks.own
        extra, extra_lse = _all_extra(extra, plan), None
        if extra is not None:
            row_lse, row_rival, extra_lse = _with_extra(image, extra, logit_scale, row_lse, row_rival, plan)
        ctx.plan = plan
        ctx.save_for_backward(image, others, extra, logit_scale, row_lse, col_lse, extra_lse)
        # the large parts first: what is left of them is small, and exact
        losses = sum((lse[0] - positive + lse[1]) / 2 for lse in (row_lse, col_lse[:, own]))
        found = positive > row_rival, positive > col_rival[own]
        ctx.mark_non_differentiable(*found)
        return losses, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        image, text, extra, logit_scale, row_lse, col_lse, extra_lse = ctx.saved_tensors
        plan, ranks = ctx.plan, ctx.plan.ranks
        row_weight = (grad / 2).contiguous()
        col_weight = row_weight if ranks is None else ranks.gather(row_weight)

        def block(texts: Tensor, columns: slice, first_label: int) -> tuple[Tensor, ...]:
            return plan.kernels.gradients(
                image,
                texts,
                logit_scale,
                _factor(image, plan.normalize),
                _factor(texts, plan.normalize),
                row_lse,
                col_lse[:, columns].contiguous(),
                row_weight,
                col_weight[columns],
                first_label,
            )

        d_image, d_text, text, (d_scale,) = _all_blocks(image, text, plan, block)
        d_extra = None
        if extra is not None:
            of_image, d_extra, of_scale = plan.kernels.gradients(
                image,
                extra,
                logit_scale,
                _factor(image, plan.normalize),
                _factor(extra, plan.normalize),
                row_lse,
                extra_lse,
                row_weight,
                row_weight.new_zeros(extra.shape[0]),  # these columns have no loss of their own
                extra.shape[0],
            )
            d_image = d_image.to(row_lse.dtype).add_(of_image)
            d_scale = d_scale + of_scale
            d_extra, extra = _own_extra(d_extra, extra, plan)
        elif ctx.needs_input_grad[2]:
            d_extra = extra = text.new_zeros(0, text.shape[1])
        gradients = (
            None if d is None else _through_norm(d, x, plan.normalize).to(dtype)
            for d, x, dtype in zip((d_image, d_text, d_extra), (image, text, extra), ctx.dtypes, strict=True)
        )
        return *gradients, d_scale, None


def _all_extra(extra: Tensor | None, plan: Plan) -> Tensor | None:
    """Return the extra texts of all ranks, or None where there are none."""
    if extra is not None and plan.ranks is not None:
        extra = plan.extra_ranks.gather(extra) if plan.extra_ranks.total else None
    return extra if extra is not None and extra.shape[0] else None


def _own_extra(d_extra: Tensor, extra: Tensor, plan: Plan) -> tuple[Tensor | None, Tensor]:
    """Return the gradient of this rank's extra texts, where any rank wants one, and these texts."""
    if not plan.extra_learns:
        return None, extra
    if plan.ranks is None:
        return d_extra, extra
    return plan.extra_ranks.reduce_scatter(d_extra), extra[plan.extra_ranks.own]


def _with_extra(
    image: Tensor, extra: Tensor, logit_scale: Tensor, row_lse: Tensor, row_rival: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """Join the rows' statistics with those over extra columns; return those columns' own log-sum-exps too."""
    of_rows, of_columns, _, rival, _ = plan.kernels.statistics(
        image,
        extra,
        logit_scale,
        _factor(image, plan.normalize),
        _factor(extra, plan.normalize),
        extra.shape[0],  # past the end: no column is a row's label
    )
    return join_lse(row_lse, of_rows), torch.maximum(row_rival, rival), of_columns


class _SigLip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
        ranks = plan.ranks

        def block(texts: Tensor, first_label: int) -> Tensor:
            return plan.kernels.siglip_statistics(
                image,
                texts,
                logit_scale,
                logit_bias,
                _factor(image, plan.normalize),
                _factor(texts, plan.normalize),
                first_label,
            )

        others = text
        if ranks is not None and plan.ring:
            losses = sum(block(texts, _label(ranks, owner)) for owner, texts in ranks.visit(text))
        elif ranks is not None:
            others = text if plan.arrived else ranks.gather(text)
            losses = block(others, ranks.own.start)
        else:
            losses = block(text, 0)
        ctx.plan = plan
        ctx.save_for_backward(image, others, logit_scale, logit_bias)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, logit_bias = ctx.saved_tensors
        plan = ctx.plan
        row_weight = grad.contiguous()

        def block(texts: Tensor, _: slice, first_label: int) -> tuple[Tensor, ...]:
            return plan.kernels.siglip_gradients(
                image,
                texts,
                logit_scale,
                logit_bias,
                _factor(image, plan.normalize),
                _factor(texts, plan.normalize),
                row_weight,
                first_label,
            )

        d_image, d_text, text, scalars = _all_blocks(image, text, plan, block)
        d_image = _through_norm(d_image, image, plan.normalize)
        return d_image, _through_norm(d_text, text, plan.normalize), *scalars, None


def _all_blocks(image: Tensor, text: Tensor, plan: Plan, block: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Return ``d_image``, this rank's ``d_text`` and texts, and the gradients of scalars.

    ``block(texts, columns, first_label)`` gives the gradients of this rank's rows with some of the columns.
    """
    ranks = plan.ranks
    if ranks is not None and plan.ring:
        d_image, d_text, scalars = _ring_gradients(image, text, ranks, block)
        return d_image, d_text, text, scalars
    d_image, d_text, *scalars = block(text, slice(None), 0 if ranks is None else ranks.own.start)
    if ranks is None or plan.arrived:
        return d_image, d_text, text, scalars
    return d_image, ranks.reduce_scatter(d_text), text[ranks.own], scalars


def _label(ranks: Ranks, owner: int) -> int:
    """Return where the labels of this rank's rows begin in the columns of ``owner``: at 0, or past the end."""
    return 0 if owner == ranks.rank else ranks.sizes[owner]


def _ring_statistics(image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan) -> tuple[Tensor, ...]:
    """As one call with all texts, holding those of one rank (and the next) at a time."""
    ranks, image_factor = plan.ranks, _factor(image, plan.normalize)
    row_lse = row_rival = positive = None
    dtype = accumulation_dtype(image.dtype)
    col_lse, col_rival = (image.new_empty(*lead, ranks.total, dtype=dtype) for lead in ((2,), ()))
    for owner, texts in ranks.visit(text):
        lse, of_columns, own, rival, rival_of_columns = plan.kernels.statistics(
            image, texts, logit_scale, image_factor, _factor(texts, plan.normalize), _label(ranks, owner)
        )
        col_lse[:, ranks.rows(owner)], col_rival[ranks.rows(owner)] = of_columns, rival_of_columns
        if row_lse is None:
            row_lse, row_rival, positive = lse, rival, own
        else:
            row_lse, row_rival = join_lse(row_lse, lse), torch.maximum(row_rival, rival)
    return row_lse, col_lse, positive, row_rival, col_rival


def _ring_gradients(image: Tensor, text: Tensor, ranks: Ranks, block: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Add up the blocks of all ranks' texts; every rank's sums travel with its texts, in the precision of sums."""
    dtype = accumulation_dtype(image.dtype)
    d_image = torch.zeros_like(image, dtype=dtype)
    scalars: list[Tensor] = []
    circling = ranks.carry(text, torch.zeros_like(text, dtype=dtype))
    for _ in ranks.sizes:
        owner, texts, sums = next(circling)
        of_image, of_text, *more = block(texts, ranks.rows(owner), _label(ranks, owner))
        d_image += of_image
        sums += of_text
        scalars = [a + b for a, b in zip(scalars, more, strict=True)] if scalars else more
    _, _, home = next(circling)
    return d_image.to(image.dtype), home.to(text.dtype), scalars
