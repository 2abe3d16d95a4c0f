"""The specification of the losses between two towers' features: all logits at once, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops.contrastive_arguments import ContrastiveAccuracy, Options
from clipfast.ops.contrastive_ranks import Ranks


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: Options,
) -> Tensor | tuple[Tensor, ContrastiveAccuracy]:
    """Compute what :func:`clipfast.ops.contrastive_loss` says."""
    text_features, extra = texts_of(text_features, options), options.extra
    if options.normalize:
        image_features, text_features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
        extra = None if extra is None else F.normalize(extra, dim=-1)
    image_features, text_features = gather(image_features, options.ranks), _gather_texts(text_features, options)
    columns = text_features
    if extra is not None:
        columns = torch.cat([text_features, gather(extra, options.extra_ranks)])
    logits = similarities(image_features, columns, logit_scale, logit_bias)
    batch = logits.shape[0]
    losses = [
        F.cross_entropy(x, _targets(x, options), reduction="none", label_smoothing=options.label_smoothing)
        for x in (logits, logits[:, :batch].T)
    ]
    own = slice(None) if options.ranks is None else options.ranks.own
    loss = (losses[0][own] + losses[1][own]) / 2 if options.reduction == "none" else (losses[0] + losses[1]).mean() / 2
    if not options.return_accuracy:
        return loss
    logits = logits.detach()
    labelled = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    rivals = logits.masked_fill(labelled, -torch.inf)
    found = (
        (logits.diagonal() > of_others).to(logits.dtype).mean()
        for of_others in (rivals.amax(1), rivals[:, :batch].amax(0))
    )
    return loss, ContrastiveAccuracy(*found)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: Options,
) -> Tensor:
    """Compute what :func:`clipfast.ops.siglip_loss` says: all of this rank's logits at once."""
    text_features = texts_of(text_features, options)
    if options.normalize:
        image_features, text_features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    batch, ranks = image_features.shape[0], options.ranks
    logits = similarities(image_features, _gather_texts(text_features, options), logit_scale, logit_bias)
    own = torch.arange(batch, device=logits.device)
    signs = torch.full_like(logits, -1.0)
    signs[own, own + (0 if ranks is None else ranks.own.start)] = 1.0
    losses = -F.logsigmoid(signs * logits).sum(1)
    return losses if options.reduction == "none" else share(losses, ranks)


def similarities(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
) -> Tensor:
    """Return logits ``[B, N]``, in float32 at least."""
    # logits stay float32 under autocast too: rounded to bfloat16, gradients are 5% off at a scale of 100
    with torch.autocast(image_features.device.type, enabled=False):
        if image_features.dtype in (torch.float16, torch.bfloat16):
            image_features, text_features = image_features.float(), text_features.float()
        logits = logit_scale * (image_features @ text_features.T)
        return logits if logit_bias is None else logits + logit_bias


def gather(features: Tensor, ranks: Ranks | None) -> Tensor:
    """Join the features of all ranks; its backward sums every rank's gradient for this rank's rows."""
    if ranks is None:
        return features
    most = max(ranks.sizes)
    parts = dist_nn.all_gather(F.pad(features, (0, 0, 0, most - features.shape[0])), group=ranks.group)
    return torch.cat([part[:size] for part, size in zip(parts, ranks.sizes, strict=True)])


def texts_of(text_features: Tensor, options: Options) -> Tensor:
    """Return this rank's texts, or those of all ranks where they have been sent."""
    return options.comm.arrive() if options.sent else text_features


def share(losses: Tensor, ranks: Ranks | None) -> Tensor:
    """Return this rank's share of a mean: the mean over ranks of shares is the mean over the joined batch."""
    return losses.mean() if ranks is None else losses.sum() * (len(ranks.sizes) / ranks.total)


def _gather_texts(features: Tensor, options: Options) -> Tensor:
    return features if options.sent else gather(features, options.ranks)


def _targets(logits: Tensor, options: Options) -> Tensor:
    """Return each row's label ``[B]``, or its distribution over the columns where pairs form groups."""
    batch = logits.shape[0]
    if options.groups is None:
        return torch.arange(batch, device=logits.device)
    ids = options.groups if options.ranks is None else options.ranks.gather(options.groups)
    together = (ids[:, None] == ids).to(logits.dtype)
    return F.pad(together / together.sum(1, keepdim=True), (0, logits.shape[1] - batch))
