"""What the contrastive losses are called with: checks on one rank, and on all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipfast.ops.contrastive_ranks import Ranks, TextExchange, meet


class Options(NamedTuple):
    """The keywords of a loss, and the ranks of its group."""

    group: dist.ProcessGroup | None
    comm: str | TextExchange
    reduction: str
    normalize: bool
    equal_batches: bool
    return_accuracy: bool = False
    ranks: Ranks | None = None

    @property
    def sent(self) -> bool:
        """Whether the texts are on their way already."""
        return isinstance(self.comm, TextExchange)


def prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    options: Options | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float | None, Options]:
    """Check a loss' arguments and meet the other ranks; for :func:`clipfast.ops.dispatch.register`."""
    # `explain` hands over the public function's keywords
    defaults = Options(None, "gather", "mean", False, False)
    options = defaults._replace(**keywords) if options is None else options
    for name, given, known in (
        ("comm", "gather" if options.sent else options.comm, ("gather", "ring")),
        ("reduction", options.reduction, ("mean", "none")),
    ):
        if given not in known:
            raise ValueError(f"contrastive_loss({name}): got {given!r}, expected one of {', '.join(map(repr, known))}")
    problem: Exception | None = None
    try:
        check_features(image_features, text_features)
        _check_scale(logit_scale)
    except (TypeError, ValueError) as error:
        if options.group is None:
            raise
        problem = error
    if options.sent:
        if problem is not None:
            raise problem
        options = options._replace(ranks=options.comm.ranks)
    elif options.group is not None:
        ranks = meet(image_features, text_features, options.group, equal_batches=options.equal_batches, problem=problem)
        options = options._replace(ranks=ranks)
    return image_features, text_features, logit_scale, logit_bias, options


def check_features(image_features: Tensor, text_features: Tensor) -> None:
    """Raise TypeError or ValueError for features that a loss does not take."""
    for name, features in (("image_features", image_features), ("text_features", text_features)):
        if not features.is_floating_point():
            raise TypeError(f"contrastive_loss({name}): got {features.dtype}, expected a floating-point dtype")
        if features.dim() != 2 or features.shape[0] == 0:
            raise ValueError(
                f"contrastive_loss({name}): got shape {tuple(features.shape)}, expected [B, D] with B of at least 1"
            )
    for what, of_image, of_text, error in (
        ("shape", tuple(image_features.shape), tuple(text_features.shape), ValueError),
        ("dtype", image_features.dtype, text_features.dtype, TypeError),
        ("device", image_features.device, text_features.device, ValueError),
    ):
        if of_image != of_text:
            raise error(
                f"contrastive_loss(text_features): got {what} {of_text}, expected {of_image}, as image_features"
            )


def _check_scale(logit_scale: Tensor | float) -> None:
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"contrastive_loss(logit_scale): got shape {tuple(logit_scale.shape)}, expected a scalar")
        # reading a value off a device would wait for it, and cannot be captured in a graph
        if logit_scale.device.type != "cpu" or torch.compiler.is_compiling():
            return
        logit_scale = logit_scale.detach()
    scale = float(logit_scale)
    if not scale >= 0:
        raise ValueError(f"contrastive_loss(logit_scale): got {scale}, expected a number of at least 0")
