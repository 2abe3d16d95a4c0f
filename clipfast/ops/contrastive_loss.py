"""The losses between two towers' features: CLIP's softmax loss and SigLIP's sigmoid loss."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import dispatch


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """CLIP's symmetric cross-entropy over the similarities of a batch; image i belongs to text i.

    ``L = ½ · (CE(s·I·Tᵀ, diagonal) + CE(s·T·Iᵀ, diagonal))``

    Args:
        image_features: ``[B, D]``, L2-normalised by the caller as in open_clip; any finite values are right.
        text_features: ``[B, D]``, in the dtype and on the device of ``image_features``.
        logit_scale: The factor s, a scalar tensor or a number ≥ 0 (``model.logit_scale.exp()``).
        logit_bias: Added to every logit. It cannot change this loss; it is here for open_clip's signature.
        group: A process group whose ranks hold equal shares of the batch. Every rank gets the loss of the joined
            batch, and gradients that are exact after the mean over ranks that DDP takes.

    Returns:
        A scalar, in float32 at least: logits and sums are taken in float32 for half-precision features.

    Raises:
        TypeError: Features that are not floating point, or differ in dtype.
        ValueError: Features that are not ``[B, D]`` of one shape with B ≥ 1, lie on two devices, or a
            ``logit_scale`` that is not a scalar or, in host memory, negative or NaN.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    """
    return dispatch.call(
        "contrastive_loss", image_features, text_features, logit_scale, logit_bias=logit_bias, group=group
    )


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """SigLIP's sigmoid loss: every image and every text of a batch form one yes-or-no question.

    ``L = −1/B · Σᵢⱼ log σ(zᵢⱼ · (s·Iᵢ·Tⱼ + b))`` with ``z = 1`` on the diagonal and −1 beside it.

    Args:
        image_features: ``[B, D]``, L2-normalised by the caller.
        text_features: ``[B, D]``, in the dtype and on the device of ``image_features``.
        logit_scale: The factor s, a scalar tensor or a number ≥ 0.
        logit_bias: The term b; none means 0.
        group: As in :func:`contrastive_loss`, but each rank gets the share of its own images; the mean over ranks
            is the loss of the joined batch.

    Returns:
        A scalar, in float32 at least.

    Raises:
        TypeError, ValueError: As :func:`contrastive_loss`.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
    """
    return dispatch.call("siglip_loss", image_features, text_features, logit_scale, logit_bias=logit_bias, group=group)


def _prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float | None, dist.ProcessGroup | None]:
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
    _check_scale(logit_scale)
    return image_features, text_features, logit_scale, logit_bias, group


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


def _logits(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
) -> Tensor:
    # logits stay float32 under autocast too: rounded to bfloat16, gradients are 5% off at a scale of 100
    with torch.autocast(image_features.device.type, enabled=False):
        if image_features.dtype in (torch.float16, torch.bfloat16):
            image_features, text_features = image_features.float(), text_features.float()
        logits = logit_scale * (image_features @ text_features.T)
        return logits if logit_bias is None else logits + logit_bias


def _gather(features: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Join the features of all ranks; its backward sums every rank's gradient for this rank's rows."""
    return features if group is None else torch.cat(dist_nn.all_gather(features, group=group))


def _reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    image_features, text_features = _gather(image_features, group), _gather(text_features, group)
    logits = _logits(image_features, text_features, logit_scale, logit_bias)
    labels = torch.arange(logits.shape[0], device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _siglip_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    batch = image_features.shape[0]
    logits = _logits(image_features, _gather(text_features, group), logit_scale, logit_bias)
    first = 0 if group is None else dist.get_rank(group) * batch
    own = torch.arange(batch, device=logits.device)
    signs = torch.full_like(logits, -1.0)
    signs[own, own + first] = 1.0
    return -F.logsigmoid(signs * logits).sum() / batch


dispatch.register(
    "contrastive_loss",
    _prepare,
    dispatch.Implementation("reference", "all logits at once, in PyTorch", _reference),
)
dispatch.register(
    "siglip_loss",
    _prepare,
    dispatch.Implementation("reference", "all logits at once, in PyTorch", _siglip_reference),
)
