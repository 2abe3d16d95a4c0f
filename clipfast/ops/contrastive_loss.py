"""The losses between two towers' features: CLIP's softmax loss and SigLIP's sigmoid loss."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import contrastive_autograd, contrastive_kernels, dispatch, library
from clipfast.ops.contrastive_autograd import Plan
from clipfast.ops.contrastive_ranks import Ranks, meet


class ContrastiveAccuracy(NamedTuple):
    """The share of images whose own text has the largest logit of this batch, and of texts; ties count as misses."""

    image_to_text: Tensor
    text_to_image: Tensor


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    comm: Literal["gather", "ring"] = "gather",
    reduction: Literal["mean", "none"] = "mean",
    normalize: bool = False,
    equal_batches: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ContrastiveAccuracy]:
    """CLIP's symmetric cross-entropy over the similarities of a batch; image i belongs to text i.

    ``L = ½ · (CE(s·I·Tᵀ, diagonal) + CE(s·T·Iᵀ, diagonal))``

    No B×B matrix is held: logits come and go in tiles, and memory is O(B·D).

    Args:
        image_features: ``[B, D]``, L2-normalised by the caller as in open_clip; any finite values are right.
        text_features: ``[B, D]``, in the dtype and on the device of ``image_features``.
        logit_scale: The factor s, a scalar tensor or a number ≥ 0 (``model.logit_scale.exp()``).
        logit_bias: Added to every logit. It cannot change this loss; it is here for open_clip's signature.
        group: A process group whose ranks hold shares of the batch, not necessarily equal. Every rank gets the loss
            of the joined batch, and gradients that are exact after the mean over ranks that DDP takes.
        comm: How texts reach the other ranks. ``"gather"``: at once; every rank holds all of them. ``"ring"``: one
            rank's after the other; every rank holds two at a time.
        reduction: ``"mean"``, or ``"none"`` for the loss of every pair of this rank, ``[B]``.
        normalize: Whether features are L2-normalised here, within the tiles, without a normalised copy.
        equal_batches: The promise that all ranks hold equally many rows. It spares the exchange of sizes, which
            waits for the device, and is needed to capture a CUDA graph; broken, ranks may wait for each other forever.
        return_accuracy: Whether to return the batch's top-1 accuracies too, which cost nothing more.

    Returns:
        A scalar, in float32 at least: logits and sums are taken in float32 for half-precision features. With
        ``reduction="none"`` ``[B]``; with ``return_accuracy`` a pair with a :class:`ContrastiveAccuracy`.

    Raises:
        TypeError: Features that are not floating point, or differ in dtype.
        ValueError: Features that are not ``[B, D]`` of one shape with B ≥ 1, lie on two devices, a ``logit_scale``
            that is not a scalar or, in host memory, negative or NaN, or an unknown ``comm`` or ``reduction``. With a
            group, what is wrong on one rank is an error on all of them.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); tiles as in
    Cheng et al., "Breaking the Memory Barrier" (Inf-CL, 2024).
    """
    options = _Options(group, comm, reduction, normalize, equal_batches, return_accuracy)
    return dispatch.call("contrastive_loss", image_features, text_features, logit_scale, logit_bias, options)


def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    comm: Literal["gather", "ring"] = "gather",
    reduction: Literal["mean", "none"] = "mean",
    normalize: bool = False,
    equal_batches: bool = False,
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
        comm, normalize, equal_batches: As in :func:`contrastive_loss`.
        reduction: ``"mean"``, or ``"none"`` for the sum over all texts of every image of this rank, ``[B]``.

    Returns:
        A scalar, in float32 at least; ``[B]`` with ``reduction="none"``.

    Raises:
        TypeError, ValueError: As :func:`contrastive_loss`.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
    """
    options = _Options(group, comm, reduction, normalize, equal_batches)
    return dispatch.call("siglip_loss", image_features, text_features, logit_scale, logit_bias, options)


class _Options(NamedTuple):
    group: dist.ProcessGroup | None
    comm: str
    reduction: str
    normalize: bool
    equal_batches: bool
    return_accuracy: bool = False
    ranks: Ranks | None = None


def _prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None = None,
    options: _Options | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor | float, Tensor | float | None, _Options]:
    # `explain` hands over the public function's keywords
    defaults = _Options(None, "gather", "mean", False, False)
    options = defaults._replace(**keywords) if options is None else options
    for name, given, known in (
        ("comm", options.comm, ("gather", "ring")),
        ("reduction", options.reduction, ("mean", "none")),
    ):
        if given not in known:
            raise ValueError(f"contrastive_loss({name}): got {given!r}, expected one of {', '.join(map(repr, known))}")
    problem: Exception | None = None
    try:
        _check_features(image_features, text_features)
        _check_scale(logit_scale)
    except (TypeError, ValueError) as error:
        if options.group is None:
            raise
        problem = error
    if options.group is not None:
        ranks = meet(image_features, text_features, options.group, equal_batches=options.equal_batches, problem=problem)
        options = options._replace(ranks=ranks)
    return image_features, text_features, logit_scale, logit_bias, options


def _check_features(image_features: Tensor, text_features: Tensor) -> None:
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


def _gather(features: Tensor, ranks: Ranks | None) -> Tensor:
    """Join the features of all ranks; its backward sums every rank's gradient for this rank's rows."""
    if ranks is None:
        return features
    most = max(ranks.sizes)
    parts = dist_nn.all_gather(F.pad(features, (0, 0, 0, most - features.shape[0])), group=ranks.group)
    return torch.cat([part[:size] for part, size in zip(parts, ranks.sizes, strict=True)])


def _reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: _Options,
) -> Tensor | tuple[Tensor, ContrastiveAccuracy]:
    """The specification: all logits at once."""
    if options.normalize:
        image_features, text_features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    image_features, text_features = (_gather(x, options.ranks) for x in (image_features, text_features))
    logits = _logits(image_features, text_features, logit_scale, logit_bias)
    labels = torch.arange(logits.shape[0], device=logits.device)
    own = slice(None) if options.ranks is None else options.ranks.own
    losses = [F.cross_entropy(x, labels, reduction="none") for x in (logits, logits.T)]
    loss = (losses[0][own] + losses[1][own]) / 2 if options.reduction == "none" else (losses[0] + losses[1]).mean() / 2
    if not options.return_accuracy:
        return loss
    rivals = logits.detach().masked_fill(torch.eye(len(labels), dtype=torch.bool, device=logits.device), -torch.inf)
    found = ((logits.detach().diagonal() > rivals.amax(dim)).to(logits.dtype).mean() for dim in (1, 0))
    return loss, ContrastiveAccuracy(*found)


def _siglip_reference(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: _Options,
) -> Tensor:
    """The specification: all of this rank's logits at once."""
    if options.normalize:
        image_features, text_features = F.normalize(image_features, dim=-1), F.normalize(text_features, dim=-1)
    batch, ranks = image_features.shape[0], options.ranks
    logits = _logits(image_features, _gather(text_features, ranks), logit_scale, logit_bias)
    own = torch.arange(batch, device=logits.device)
    signs = torch.full_like(logits, -1.0)
    signs[own, own + (0 if ranks is None else ranks.own.start)] = 1.0
    losses = -F.logsigmoid(signs * logits).sum(1)
    return losses if options.reduction == "none" else _share(losses, ranks)


def _share(losses: Tensor, ranks: Ranks | None) -> Tensor:
    """Return this rank's share of a mean: the mean over ranks of shares is the mean over the joined batch."""
    return losses.mean() if ranks is None else losses.sum() * (len(ranks.sizes) / ranks.total)


def _scalar(value: Tensor | float | None, like: Tensor) -> Tensor:
    """Return a scalar argument as a tensor in the precision of logits."""
    dtype = contrastive_kernels.accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=dtype).reshape(())
    return torch.full((), 0.0 if value is None else float(value), device=like.device, dtype=dtype)


def _plan(kernels: contrastive_kernels.Kernels, options: _Options) -> Plan:
    return Plan(kernels, options.ranks, options.comm == "ring", options.normalize)


def _tiled(
    kernels: contrastive_kernels.Kernels,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: _Options,
) -> Tensor | tuple[Tensor, ContrastiveAccuracy]:
    scale, ranks = _scalar(logit_scale, image_features), options.ranks
    loss, *found = contrastive_autograd.contrastive_losses(
        _rows(image_features), _rows(text_features), scale, _plan(kernels, options)
    )
    if options.reduction == "mean":
        loss = contrastive_autograd.joined_mean(loss, ranks)
    if isinstance(logit_bias, Tensor):
        # the bias moves all logits alike: its gradient is zero, not missing
        loss = loss + 0 * _scalar(logit_bias, loss)
    if not options.return_accuracy:
        return loss
    counts = torch.stack(found).sum(1, dtype=loss.dtype)
    shares = counts / image_features.shape[0] if ranks is None else ranks.sum(counts) / ranks.total
    return loss, ContrastiveAccuracy(*shares.unbind())


def _siglip_tiled(
    kernels: contrastive_kernels.Kernels,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: _Options,
) -> Tensor:
    losses = contrastive_autograd.siglip_losses(
        _rows(image_features),
        _rows(text_features),
        _scalar(logit_scale, image_features),
        _scalar(logit_bias, image_features),
        _plan(kernels, options),
    )
    return losses if options.reduction == "none" else _share(losses, options.ranks)


def _rows(features: Tensor) -> Tensor:
    """Return features as the kernels read them: the last dimension contiguous, no two rows in one place."""
    in_place = features.stride(1) == 1 and features.stride(0) >= features.shape[1]
    return features if in_place else features.contiguous()


def _native_refusal(image_features: Tensor, *_: object) -> str | None:
    if contrastive_kernels.native is None:
        return contrastive_kernels.native_unavailable
    if image_features.device.type not in contrastive_kernels.native_devices:
        return f"the op library has no kernels for {image_features.device.type}"
    return library.card_refusal(image_features.device.index) if image_features.is_cuda else None


def _native(*arguments: Any) -> Any:
    return _tiled(contrastive_kernels.native, *arguments)


def _siglip_native(*arguments: Any) -> Any:
    return _siglip_tiled(contrastive_kernels.native, *arguments)


def _chunked(*arguments: Any) -> Any:
    _announce(arguments[0])
    return _tiled(contrastive_kernels.chunked, *arguments)


def _siglip_chunked(*arguments: Any) -> Any:
    _announce(arguments[0])
    return _siglip_tiled(contrastive_kernels.chunked, *arguments)


def _announce(image_features: Tensor) -> None:
    reason = _native_refusal(image_features)
    if reason is not None:
        dispatch.announce_slower("contrastive losses", f"run in chunks in PyTorch: {reason}")


for _op, _implementations in (
    ("contrastive_loss", (_native, _chunked, _reference)),
    ("siglip_loss", (_siglip_native, _siglip_chunked, _siglip_reference)),
):
    dispatch.register(
        _op,
        _prepare,
        dispatch.Implementation("native", "tiles in the op library", _implementations[0], _native_refusal),
        dispatch.Implementation("torch", "tiles in PyTorch", _implementations[1]),
        dispatch.Implementation("reference", "all logits at once, in PyTorch", _implementations[2]),
    )
