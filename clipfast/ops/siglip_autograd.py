"""SigLIP's loss from tile kernels, on one rank or several, with its gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
from clipfast.ops.contrastive_reference import share


def siglip_losses(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
    """Return each image's loss ``[b]``, summed over all texts."""
    return _SigLip.apply(image, text, logit_scale, logit_bias, plan)


def siglip_share(image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
    """Return this rank's share of the mean over images."""
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (image, text, logit_scale, logit_bias))
    # Around a ring, sums of gradients would travel before the weights that other ranks give theirs are known.
    if learns and not plan.ring:
        return _SigLipShare.apply(image, text, logit_scale, logit_bias, plan)
    return share(siglip_losses(image, text, logit_scale, logit_bias, plan), plan.ranks)


class _SigLip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
        ctx.dtypes = image.dtype, text.dtype
        image, image_powers = as_read(image, plan)
        text, powers = as_read(text, plan)
        powers, ranks = all_powers(powers, plan), plan.ranks

        def block(texts: Tensor, columns: slice, first_label: int) -> Tensor:
            return plan.kernels.siglip_statistics(
                image,
                texts,
                logit_scale,
                logit_bias,
                factor(image, plan.normalize, image_powers),
                factor(texts, plan.normalize, None if powers is None else powers[columns]),
                first_label,
            )

        others = text
        if ranks is not None and plan.ring:
            losses = sum(block(t, ranks.rows(owner), label_of(ranks, owner)) for owner, t in ranks.visit(text))
        elif ranks is not None:
            others = text if plan.arrived else ranks.gather(text)
            losses = block(others, slice(None), ranks.own.start)
        else:
            losses = block(text, slice(None), 0)
        ctx.plan = plan
        ctx.save_for_backward(image, others, logit_scale, logit_bias, image_powers, powers)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, logit_scale, logit_bias, image_powers, powers = ctx.saved_tensors
        plan, row_weight = ctx.plan, grad.contiguous()

        def block(texts: Tensor, columns: slice, first_label: int) -> tuple[Tensor, ...]:
            return _gradients(
                image, texts, logit_scale, logit_bias, image_powers, powers, row_weight, plan, columns, first_label
            )[1:]

        d_image, d_text, text, scalars = all_blocks(image, text, plan, block)
        d_image = through_factor(d_image, image, plan.normalize, image_powers).to(ctx.dtypes[0])
        d_text = through_factor(d_text, text, plan.normalize, own(powers, plan)).to(ctx.dtypes[1])
        return d_image, d_text, *scalars, None


class _SigLipShare(torch.autograd.Function):
    """Gradients are formed with the loss, from one look at the logits: a sigmoid needs no sum over its row first.

    6·B²·D operations in place of 8. What comes backwards is one number, by which they are multiplied then.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, plan: Plan) -> Tensor:
        ctx.dtypes, ctx.plan, ranks = (image.dtype, text.dtype), plan, plan.ranks
        image, image_powers = as_read(image, plan)
        text, powers = as_read(text, plan)
        powers = all_powers(powers, plan)
        if ranks is not None and not plan.arrived:
            text = ranks.gather(text)
        weight = 1 / image.shape[0] if ranks is None else len(ranks.sizes) / ranks.total
        row_weight = logit_scale.new_full(image.shape[:1], weight)
        first_label = 0 if ranks is None else ranks.own.start
        # in the precision of sums: without its weight, a gradient may be too small for 16 bits
        losses, d_image, d_text, d_scale, d_bias = _gradients(
            image, text, logit_scale, logit_bias, image_powers, powers, row_weight, plan, slice(None), first_label, True
        )
        d_image = through_factor(d_image, image, plan.normalize, image_powers)
        d_text = through_factor(d_text, text, plan.normalize, powers)
        ctx.save_for_backward(d_image, d_text, d_scale, d_bias)
        return share(losses, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_image, d_text, d_scale, d_bias = ctx.saved_tensors
        plan = ctx.plan
        d_image, d_text = ((d * grad).to(dtype) for d, dtype in zip((d_image, d_text), ctx.dtypes, strict=True))
        if plan.ranks is not None and not plan.arrived:
            d_text = plan.ranks.reduce_scatter(d_text)
        return d_image, d_text, d_scale * grad, d_bias * grad, None


def _gradients(
    image: Tensor,
    texts: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_powers: Tensor | None,
    powers: Tensor | None,
    row_weight: Tensor,
    plan: Plan,
    columns: slice,
    first_label: int,
    wide: bool = False,
) -> tuple[Tensor, ...]:
    # twice: the statistics' arguments, and the weights
    return plan.kernels.siglip_gradients(
        image,
        texts,
        logit_scale,
        logit_bias,
        factor(image, plan.normalize, image_powers),
        factor(texts, plan.normalize, None if powers is None else powers[columns]),
        row_weight,
        first_label,
        is_wide(plan, wide),
    )
