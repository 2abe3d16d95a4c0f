"""One step's gradients: of the whole batch at once, or by parts that need less memory and give the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from clipfast import ops
from clipfast.modules.naflex import NaFlexBatch
from clipfast.train.towers import Features, Towers


class StepSeeds(NamedTuple):
    """Where the random numbers of a step come from: the same step of the same run draws the same ones, anywhere."""

    seed: int
    step: int
    rank: int

    def of_part(self, part: int) -> tuple[int, int]:
        """Return the seeds of the text tower and the image tower for a part of the batch."""
        words = np.random.SeedSequence([self.seed, self.step, self.rank, part]).generate_state(2, np.uint64)
        return int(words[0] >> np.uint64(1)), int(words[1] >> np.uint64(1))


class StepLoss(NamedTuple):
    """What a step's batch gave, on the device.

    Attributes:
        loss: Of the batch joined over ranks.
        logit_scale: The factor between cosines and logits.
        logit_bias: What is added to them; None without one.
    """

    loss: Tensor
    logit_scale: Tensor
    logit_bias: Tensor | None = None


def compute_gradients(
    shared: nn.Module,
    images: Tensor | NaFlexBatch,
    tokens: Tensor,
    seeds: StepSeeds,
    *,
    micro_batch_size: int | None = None,
    loss_factor: Tensor | float = 1.0,
    equal_batches: bool = False,
    loss: Literal["clip", "siglip"] = "clip",
    label_smoothing: float = 0.0,
    teacher: Towers | None = None,
) -> StepLoss:
    """Add a batch's gradients to the parameters'.

    With ``micro_batch_size``, parts of the batch are encoded without a graph, the loss of the whole batch gives the
    gradients of all features, and each part is encoded once more to pass its own back: the gradients of the whole
    batch, for every parameter and the temperature, with the activations of one part. Random numbers are the same in
    both passes (Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021). A tower
    that has nothing to learn is encoded once.

    Args:
        shared: :class:`clipfast.train.towers.Towers`, or what :func:`clipfast.train.towers.share_towers` made of it.
        images: This rank's ``[b, 3, H, W]``, or packed patches of b pictures.
        tokens: This rank's ``[b, L]``.
        seeds: Of the random numbers.
        micro_batch_size: Pairs encoded at once; all of them if None.
        loss_factor: What the loss is multiplied by before the backward pass (fp16's scale).
        equal_batches: The promise that all ranks hold equally many pairs.
        loss: ``"clip"`` for :func:`clipfast.ops.contrastive_loss`, ``"siglip"`` for :func:`clipfast.ops.siglip_loss` of
            a model with ``logit_bias``, which takes neither smoothing nor a teacher.
        label_smoothing: The loss's; see :func:`clipfast.ops.contrastive_loss`.
        teacher: Another model's towers, whose logits the loss draws the model's to as well; see
            :func:`clipfast.ops.distillation_loss`. It takes no smoothing.
    """
    size = micro_batch_size or len(images)
    taught = None if teacher is None else _encoded(teacher, images.split(size), tokens.split(size))
    options = {"equal_batches": equal_batches, "label_smoothing": label_smoothing, "taught": taught}
    loss_of = partial(_siglip_loss, shared=shared) if loss == "siglip" else partial(_loss, shared=shared, **options)
    # a loss with a teacher gathers texts by itself
    send = _has_ranks(shared) and teacher is None
    if size >= len(images):
        features = shared(images, tokens, seeds.of_part(0), send, equal_batches)
        value = loss_of(features)
        (value * loss_factor).backward()
        bias = features.logit_bias
        found = StepLoss(value.detach(), features.logit_scale.detach(), None if bias is None else bias.detach())
    else:
        parts = images.split(size), tokens.split(size)
        found = _by_parts(shared, *parts, seeds, loss_of, loss_factor, send, equal_batches)
    # each rank had the share of its own images
    return found._replace(loss=_mean_over_ranks(found.loss, shared)) if loss == "siglip" else found


def _by_parts(
    shared: nn.Module,
    images: Sequence[Tensor | NaFlexBatch],
    tokens: Sequence[Tensor],
    seeds: StepSeeds,
    loss_of: Callable[[Features], Tensor],
    loss_factor: Tensor | float,
    send: bool,
    equal_batches: bool,
) -> StepLoss:
    towers, size = _plain(shared), len(images[0])
    parts = range(len(images))
    with torch.no_grad():
        texts = [towers(None, tokens[i], seeds.of_part(i)) for i in parts]
    text = torch.cat([t.text for t in texts]).requires_grad_()
    scalars = [None if x is None else x.detach().clone().requires_grad_() for x in texts[0].scalars]
    sent = None
    if send:
        sent = ops.send_texts(text, _towers(shared).workplace.group, equal_batches=equal_batches)
    with torch.no_grad():
        image = torch.cat([towers(images[i], None, seeds.of_part(i)).image for i in parts])
    image.requires_grad_()
    loss = loss_of(Features(image, text, scalars[0], sent, scalars[1]))
    (loss * loss_factor).backward()

    # a tower that learns nothing has no second pass
    image_learns, text_learns = _towers(shared).image_learns, _towers(shared).text_learns
    of_images, of_texts = image.grad.split(size), text.grad.split(size)
    for i in parts:
        last = i == parts[-1]
        with nullcontext() if last else _without_sync(shared):
            features = shared(images[i] if image_learns else None, tokens[i] if text_learns else None, seeds.of_part(i))
            # the scalars' gradients go with the last part, which is the one that ranks exchange
            of_scalars = [None if x is None or x.grad is None else x.grad if last else 0 * x.detach() for x in scalars]
            results = (features.image, features.text, *features.scalars)
            pairs = [
                (x, gradient)
                for x, gradient in zip(results, (of_images[i], of_texts[i], *of_scalars), strict=True)
                if x is not None and x.requires_grad and gradient is not None
            ]
            torch.autograd.backward(*zip(*pairs, strict=True))
    return StepLoss(loss.detach(), *(None if x is None else x.detach() for x in scalars))


def _loss(
    features: Features, shared: nn.Module, equal_batches: bool, label_smoothing: float, taught: Features | None
) -> Tensor:
    group, student = _towers(shared).workplace.group, features[:3]
    if taught is not None:
        losses = ops.distillation_loss(*student, *taught[:3], group=group, equal_batches=equal_batches)
        return losses.contrastive + losses.distill
    options = {} if features.sent is None else {"group": group, "comm": features.sent}
    return ops.contrastive_loss(*student, label_smoothing=label_smoothing, **options)


def _siglip_loss(features: Features, shared: nn.Module) -> Tensor:
    """Return this rank's share: the mean over ranks is the loss of the joined batch."""
    options = {} if features.sent is None else {"group": _towers(shared).workplace.group, "comm": features.sent}
    return ops.siglip_loss(*features[:3], logit_bias=features.logit_bias, **options)


def _mean_over_ranks(value: Tensor, shared: nn.Module) -> Tensor:
    workplace = _towers(shared).workplace
    return value if workplace.group is None else workplace.sum(value) / workplace.world_size


@torch.no_grad()
def _encoded(teacher: Towers, images: Sequence[Tensor | NaFlexBatch], tokens: Sequence[Tensor]) -> Features:
    parts = [teacher(i, t) for i, t in zip(images, tokens, strict=True)]
    image, text = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    return Features(image, text, parts[0].logit_scale)


def _plain(shared: nn.Module) -> nn.Module:
    """Return what encodes without preparing a backward pass; FSDP2's own hooks gather weights, and stay."""
    return shared.module if isinstance(shared, DistributedDataParallel) else shared


def _towers(shared: nn.Module) -> Towers:
    return _plain(shared)


def _has_ranks(shared: nn.Module) -> bool:
    return _towers(shared).workplace.group is not None


@contextmanager
def _without_sync(shared: nn.Module) -> Iterator[None]:
    """Let gradients add up on their rank."""
    if isinstance(shared, DistributedDataParallel):
        with shared.no_sync():
            yield
    elif hasattr(shared, "set_requires_gradient_sync"):
        shared.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            shared.set_requires_gradient_sync(True)
    else:
        yield
