"""CLIP's loss from tile kernels, on one rank or several, with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast.ops import contrastive_kept
from clipfast.ops.contrastive_kernels import accumulation_dtype, join_lse
from clipfast.ops.contrastive_plan import (
    Plan,
    all_blocks,
    all_powers,
    as_read,
    factor,
    is_wide,
    label_of,
    own,
    through_factor,
)
from clipfast.ops.contrastive_ranks import Ranks


def contrastive_losses(
    image: Tensor, text: Tensor, logit_scale: Tensor, plan: Plan, extra: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each pair's loss ``[b]`` and whether each image and each text finds its own first (bool ``[b]``).

    ``extra`` are this rank's texts ``[m, D]`` beside the pairs: columns that images are held against, without a row.
    """
    return _Contrastive.apply(image, text, extra, logit_scale, plan)


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


class _Contrastive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, extra: Tensor | None, logit_scale: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dtypes = [None if x is None else x.dtype for x in (image, text, extra)]
        image, image_powers = as_read(image, plan)
        text, powers = as_read(text, plan)
        powers, ranks = all_powers(powers, plan), plan.ranks
        image_factor = factor(image, plan.normalize, image_powers)
        others, products = text, None
        if ranks is not None and plan.ring:
            statistics = _ring_statistics(image, text, logit_scale, image_factor, powers, plan)
        else:
            others = text if ranks is None or plan.arrived else ranks.gather(text)
            text_factor = factor(others, plan.normalize, powers)
            first_label = 0 if ranks is None else ranks.own.start
            arguments = image, others, logit_scale, image_factor, text_factor, first_label
            if contrastive_kept.keeps(image, others, plan.kernels, any(ctx.needs_input_grad)):
                *statistics, products = contrastive_kept.statistics(*arguments)
            else:
                statistics = plan.kernels.statistics(*arguments)
        row_lse, col_lse, positive, row_rival, col_rival = statistics
        of_rank = slice(0, image.shape[0])
        if ranks is not None:
            col_lse, col_rival, of_rank = ranks.join_lse(col_lse), ranks.max(col_rival), ranks.own
        extra, extra_powers = _all_extra(extra, plan)
        extra_lse = None
        if extra is not None:
            # past the end: no column is a row's label
            of_rows, extra_lse, _, rival, _ = plan.kernels.statistics(
                image, extra, logit_scale, image_factor, factor(extra, plan.normalize, extra_powers), extra.shape[0]
            )
            row_lse, row_rival = join_lse(row_lse, of_rows), torch.maximum(row_rival, rival)
        ctx.plan = plan
        ctx.save_for_backward(
            image, others, extra, logit_scale, row_lse, col_lse, extra_lse, image_powers, powers, extra_powers, products
        )
        # the large parts first: what is left of them is small, and exact
        losses = sum((lse[0] - positive + lse[1]) / 2 for lse in (row_lse, col_lse[:, of_rank]))
        found = positive > row_rival, positive > col_rival[of_rank]
        ctx.mark_non_differentiable(*found)
        return losses, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Tensor | None, ...]:
        image, text, extra, logit_scale, row_lse, col_lse, extra_lse, image_powers, powers, extra_powers, products = (
            ctx.saved_tensors
        )
        plan, ranks = ctx.plan, ctx.plan.ranks
        image_factor, wide = factor(image, plan.normalize, image_powers), is_wide(plan, extra is not None)
        row_weight = (grad / 2).contiguous()
        col_weight = row_weight if ranks is None else ranks.gather(row_weight)

        def block(texts: Tensor, columns: slice, first_label: int) -> tuple[Tensor, ...]:
            kept = () if products is None else (products,)
            gradients = contrastive_kept.gradients if kept else plan.kernels.gradients
            return gradients(
                *kept,
                image,
                texts,
                logit_scale,
                image_factor,
                factor(texts, plan.normalize, None if powers is None else powers[columns]),
                row_lse,
                col_lse[:, columns].contiguous(),
                row_weight,
                col_weight[columns],
                first_label,
                wide,
            )

        d_image, d_text, text, (d_scale,) = all_blocks(image, text, plan, block)
        d_extra = None
        if extra is not None:
            of_image, d_extra, of_scale = plan.kernels.gradients(
                image,
                extra,
                logit_scale,
                image_factor,
                factor(extra, plan.normalize, extra_powers),
                row_lse,
                extra_lse,
                row_weight,
                row_weight.new_zeros(extra.shape[0]),  # these columns have no loss of their own
                extra.shape[0],
                wide,
            )
            d_image = d_image.add_(of_image)
            d_scale = d_scale + of_scale
            d_extra, extra, extra_powers = _own_extra(d_extra, extra, extra_powers, plan)
        elif ctx.needs_input_grad[2]:
            d_extra = extra = text.new_zeros(0, text.shape[1])
        sides = ((d_image, image, image_powers), (d_text, text, own(powers, plan)), (d_extra, extra, extra_powers))
        gradients = (
            None if d is None else through_factor(d, x, plan.normalize, p).to(dtype)
            for (d, x, p), dtype in zip(sides, ctx.dtypes, strict=True)
        )
        return *gradients, d_scale, None


def _all_extra(extra: Tensor | None, plan: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Return the extra texts of all ranks as the kernels read them, and their powers; or None where there are none."""
    if extra is None or (extra.shape[0] if plan.ranks is None else plan.extra_ranks.total) == 0:
        return None, None
    extra, powers = as_read(extra, plan)
    if plan.ranks is not None:
        extra, powers = (None if x is None else plan.extra_ranks.gather(x) for x in (extra, powers))
    return extra, powers


def _own_extra(
    d_extra: Tensor, extra: Tensor, powers: Tensor | None, plan: Plan
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the gradient of this rank's extra texts, where any rank wants one, with these texts and their powers."""
    if not plan.extra_learns:
        return None, extra, powers
    if plan.ranks is None:
        return d_extra, extra, powers
    of_rank = plan.extra_ranks.own
    return plan.extra_ranks.reduce_scatter(d_extra), extra[of_rank], None if powers is None else powers[of_rank]


def _ring_statistics(
    image: Tensor, text: Tensor, logit_scale: Tensor, image_factor: Tensor | None, powers: Tensor | None, plan: Plan
) -> tuple[Tensor, ...]:
    """As one call with all texts, holding those of one rank (and the next) at a time."""
    ranks = plan.ranks
    row_lse = row_rival = positive = None
    dtype = accumulation_dtype(image.dtype)
    col_lse, col_rival = (image.new_empty(*lead, ranks.total, dtype=dtype) for lead in ((2,), ()))
    for owner, texts in ranks.visit(text):
        rows = ranks.rows(owner)
        text_factor = factor(texts, plan.normalize, None if powers is None else powers[rows])
        lse, of_columns, of_labels, rival, rival_of_columns = plan.kernels.statistics(
            image, texts, logit_scale, image_factor, text_factor, label_of(ranks, owner)
        )
        col_lse[:, rows], col_rival[rows] = of_columns, rival_of_columns
        if row_lse is None:
            row_lse, row_rival, positive = lse, rival, of_labels
        else:
            row_lse, row_rival = join_lse(row_lse, lse), torch.maximum(row_rival, rival)
    return row_lse, col_lse, positive, row_rival, col_rival
