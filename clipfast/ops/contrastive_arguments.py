"""What the contrastive losses are called with: checks on one rank, and on all."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from clipfast.ops.contrastive_ranks import Ranks, TextExchange, meet, meet_extra


class ContrastiveAccuracy(NamedTuple):
    """The share of images whose own text has the largest logit of this batch, and of texts; ties count as misses."""

    image_to_text: Tensor
    text_to_image: Tensor


class Options(NamedTuple):
    """The keywords of a loss, and the ranks of its group.

    ``extra`` are this rank's extra texts, ``extra_ranks`` how many each rank has, and ``extra_learns`` whether any of
    them wants gradients.
    """

    group: dist.ProcessGroup | None
    comm: str | TextExchange
    reduction: str
    normalize: bool
    equal_batches: bool
    return_accuracy: bool = False
    label_smoothing: float = 0.0
    groups: Tensor | None = None
    extra: Tensor | None = None
    ranks: Ranks | None = None
    extra_ranks: Ranks | None = None
    extra_learns: bool = True

    @property
    def sent(self) -> bool:
        """Whether the texts are on their way already."""
        return isinstance(self.comm, TextExchange)

    @property
    def has_targets(self) -> bool:
        """Whether a row's target is another distribution than its own pair alone."""
        return self.label_smoothing > 0 or self.groups is not None


def prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    options: Options | None = None,
    *,
    problem: Exception | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float | None, Options]:
    """Check a loss' arguments and meet the other ranks; for :func:`clipfast.ops.dispatch.register`.

    What a caller found wrong already, its ``problem``, is told to the other ranks too.
    """
    # `explain` hands over the public function's keywords
    defaults = Options(None, "gather", "mean", False, False)
    if "extra_text_features" in keywords:
        keywords["extra"] = keywords.pop("extra_text_features")
    options = defaults._replace(**keywords) if options is None else options
    check_smoothing(options.label_smoothing)
    for name, given, known in (
        ("comm", "gather" if options.sent else options.comm, ("gather", "ring")),
        ("reduction", options.reduction, ("mean", "none")),
    ):
        if given not in known:
            raise ValueError(f"contrastive_loss({name}): got {given!r}, expected one of {', '.join(map(repr, known))}")
    try:
        check_features(image_features, text_features)
        check_scale(logit_scale)
        _check_groups(options.groups, image_features)
        _check_extra(options.extra, image_features)
    except (TypeError, ValueError) as error:
        if options.group is None:
            raise
        problem = problem or error
    if options.sent:
        if problem is not None:
            raise problem
        options = options._replace(ranks=options.comm.ranks)
    elif options.group is not None:
        given = tuple(name for name in ("groups", "extra") if getattr(options, name) is not None)
        ranks = meet(
            image_features,
            text_features,
            options.group,
            equal_batches=options.equal_batches,
            problem=problem,
            given=given,
        )
        options = options._replace(ranks=ranks)
    if options.extra is not None and options.ranks is not None:
        extra_ranks, learns = meet_extra(options.extra, options.ranks, equal_batches=options.equal_batches)
        options = options._replace(extra_ranks=extra_ranks, extra_learns=learns)
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
    check_alike("contrastive_loss(text_features)", text_features, image_features, "shape", "dtype", "device")


def check_alike(name: str, x: Tensor, image_features: Tensor, *properties: str) -> None:
    """Raise unless an argument has properties of the images' features: ``"shape"``, ``"dtype"`` or ``"device"``.

    Raises:
        TypeError: Its dtype is another.
        ValueError: Its shape or its device is.
    """
    for what in properties:
        came, expected = (tuple(t.shape) if what == "shape" else getattr(t, what) for t in (x, image_features))
        if came != expected:
            error = TypeError if what == "dtype" else ValueError
            raise error(f"{name}: got {what} {came}, expected {expected}, as image_features")


def check_smoothing(label_smoothing: float, name: str = "contrastive_loss(label_smoothing)") -> None:
    """Raise TypeError or ValueError for what is no share of a target."""
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"{name}: got {label_smoothing!r}, expected a number")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{name}: got {label_smoothing}, expected a number of at least 0 and below 1")


def _check_groups(groups: Tensor | None, image_features: Tensor) -> None:
    if groups is None:
        return
    if not isinstance(groups, Tensor):
        raise TypeError(f"contrastive_loss(groups): got {type(groups).__name__}, expected a tensor of integers")
    if groups.dtype not in (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"contrastive_loss(groups): got {groups.dtype}, expected integers such as torch.int64")
    if groups.shape != image_features.shape[:1]:
        raise ValueError(
            f"contrastive_loss(groups): got shape {tuple(groups.shape)}, expected [{image_features.shape[0]}], one id "
            f"a pair"
        )
    check_alike("contrastive_loss(groups)", groups, image_features, "device")


def _check_extra(extra: Tensor | None, image_features: Tensor) -> None:
    if extra is None:
        return
    name = "contrastive_loss(extra_text_features)"
    if not isinstance(extra, Tensor):
        raise TypeError(f"{name}: got {type(extra).__name__}, expected a tensor [M, D]")
    width = image_features.shape[1]
    if extra.dim() != 2 or extra.shape[1] != width:
        raise ValueError(f"{name}: got shape {tuple(extra.shape)}, expected [M, {width}], as wide as image_features")
    check_alike(name, extra, image_features, "dtype", "device")


def check_scale(logit_scale: Tensor | float, name: str = "contrastive_loss(logit_scale)") -> None:
    """Raise ValueError for a factor of logits that is no scalar or, where that can be seen, negative or NaN."""
    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"{name}: got shape {tuple(logit_scale.shape)}, expected a scalar")
        # reading a value off a device would wait for it, and cannot be captured in a graph
        if logit_scale.device.type != "cpu" or torch.compiler.is_compiling():
            return
        logit_scale = logit_scale.detach()
    scale = float(logit_scale)
    if not scale >= 0:
        raise ValueError(f"{name}: got {scale}, expected a number of at least 0")
