"""The losses between two towers' features: CLIP's softmax loss and SigLIP's sigmoid loss."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import (
    contrastive_autograd,
    contrastive_cuda,
    contrastive_kernels,
    contrastive_narrow,
    contrastive_reference,
    dispatch,
    fallback,
    library,
    library_notice,
    siglip_autograd,
)
from clipfast.ops.contrastive_arguments import ContrastiveAccuracy, Options, check_features, prepare
from clipfast.ops.contrastive_plan import Plan
from clipfast.ops.contrastive_ranks import TextExchange, meet
from clipfast.ops.contrastive_reference import texts_of
from clipfast.ops.contrastive_targets import corrections


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    comm: Literal["gather", "ring"] | TextExchange = "gather",
    reduction: Literal["mean", "none"] = "mean",
    normalize: bool = False,
    equal_batches: bool = False,
    return_accuracy: bool = False,
    label_smoothing: float = 0.0,
    groups: Tensor | None = None,
    extra_text_features: Tensor | None = None,
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
            rank's after the other; every rank holds two at a time. What :func:`send_texts` gave for these texts: they
            have been on their way since then, and their gradients travel while the image tower's backward runs.
        reduction: ``"mean"``, or ``"none"`` for the loss of every pair of this rank, ``[B]``.
        normalize: Whether features are L2-normalised here, within the tiles, without a normalised copy.
        equal_batches: The promise that all ranks hold equally many rows. It spares the exchange of sizes, which
            waits for the device, and is needed to capture a CUDA graph; broken, ranks may wait for each other forever.
        return_accuracy: Whether to return the batch's top-1 accuracies too, which cost nothing more.
        label_smoothing: The share ε of every target that is spread evenly over all columns of its row, as
            :func:`torch.nn.functional.cross_entropy` does in both directions.
        groups: Integers ``[B]``. All images and texts of pairs with one id belong together: a row's target is even over
            them, as in SupCon's ``L_out`` and UniCL; ε is taken off that. None: every pair is alone.
        extra_text_features: ``[M, D]`` texts that belong to no image (hard negatives, a queue of earlier texts), M ≥ 0:
            columns of the images' rows, which then have B + M of them, and no rows of their own. They get gradients if
            they want some. With a group, each rank brings its own and every image is held against those of all: what
            all ranks keep alike, such as one queue, must come from one of them. ``equal_batches`` promises equally many
            of these too, and that all ranks' want gradients or none.

    Returns:
        A scalar, in float32 at least: logits and sums are taken in float32 for half-precision features. With
        ``reduction="none"`` ``[B]``; with ``return_accuracy`` a pair with a :class:`ContrastiveAccuracy`.

    Raises:
        TypeError: Features that are not floating point, or differ in dtype.
        ValueError: Features that are not ``[B, D]`` of one shape with B ≥ 1, lie on two devices, a ``logit_scale``
            that is not a scalar or, in host memory, negative or NaN, an unknown ``comm`` or ``reduction``, a
            ``label_smoothing`` outside 0 ≤ ε < 1, or ``groups`` or extra texts of another shape or device. With a
            group, what is wrong on one rank is an error on all of them.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021); tiles as in
    Cheng et al., "Breaking the Memory Barrier" (Inf-CL, 2024); groups as in Khosla et al., "Supervised Contrastive
    Learning" (2020), and Yang et al., "Unified Contrastive Learning in Image-Text-Label Space" (2022); extra texts as
    in Yuksekgonul et al., "When and Why Vision-Language Models Behave like Bags-Of-Words" (NegCLIP, 2023).
    """
    options = Options(
        group,
        comm,
        reduction,
        normalize,
        equal_batches,
        return_accuracy,
        label_smoothing,
        groups,
        extra_text_features,
    )
    return dispatch.call("contrastive_loss", image_features, text_features, logit_scale, logit_bias, options)


# twice: the losses have arguments in common; those of a public function are told one by one
def siglip_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    *,
    logit_bias: Tensor | float | None = None,
    group: dist.ProcessGroup | None = None,
    comm: Literal["gather", "ring"] | TextExchange = "gather",
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
    options = Options(group, comm, reduction, normalize, equal_batches)
    return dispatch.call("siglip_loss", image_features, text_features, logit_scale, logit_bias, options)


def send_texts(
    text_features: Tensor, group: dist.ProcessGroup | None = None, *, equal_batches: bool = False
) -> TextExchange:
    """Send texts to all ranks of a group and return at once, so that the image tower runs while they travel.

    Hand the result to a loss as ``comm``. In the backward pass the texts' gradients travel while the image tower's
    backward runs, where the text tower ran first: autograd goes backwards through what came last.

    Args:
        text_features: This rank's ``[b, D]``, as the loss will get them.
        group: The process group; the default one if None.
        equal_batches: As in :func:`contrastive_loss`.

    Raises:
        TypeError, ValueError: The features are not ``[b, D]`` with b of at least 1, or differ between ranks in width or
            dtype; on every rank.
    """
    group = dist.group.WORLD if group is None else group
    problem: Exception | None = None
    try:
        check_features(text_features, text_features)
    except (TypeError, ValueError) as error:
        problem = error
    return TextExchange(
        text_features, meet(text_features, text_features, group, equal_batches=equal_batches, problem=problem)
    )


def as_scalar(value: Tensor | float | None, like: Tensor) -> Tensor:
    """Return a scalar argument as a tensor in the precision of logits."""
    dtype = contrastive_kernels.accumulation_dtype(like.dtype)
    if isinstance(value, Tensor):
        return value.to(device=like.device, dtype=dtype).reshape(())
    return torch.full((), 0.0 if value is None else float(value), device=like.device, dtype=dtype)


def _plan(
    kernels: contrastive_kernels.Kernels, options: Options, dtype: torch.dtype | None = None, scaled: bool = False
) -> Plan:
    return Plan(
        kernels,
        options.ranks,
        options.comm == "ring",
        options.normalize,
        options.sent,
        dtype,
        scaled,
        options.extra_ranks,
        options.extra_learns,
    )


def _tiled(
    kernels: contrastive_kernels.Kernels,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float | None,
    options: Options,
) -> Tensor | tuple[Tensor, ContrastiveAccuracy]:
    scale, ranks = as_scalar(logit_scale, image_features), options.ranks
    image, text, extra = image_features, text_features, options.extra
    narrow = contrastive_narrow.tile_dtype(image)
    dtype = narrow
    if options.has_targets and image.dtype != scale.dtype:
        # two terms' gradients are added before they are rounded to 16 bits
        dtype = image.dtype
        image, text, extra = (None if x is None else x.to(scale.dtype) for x in (image, text, extra))
    elif options.has_targets and narrow is not None:
        # what takes a target off a log-sum-exp has to be of the same features
        image, text, extra = (
            None if x is None else contrastive_narrow.rounded(x, narrow) for x in (image, text, extra)
        )
    loss, *found = contrastive_autograd.contrastive_losses(
        as_rows(image),
        as_rows(texts_of(text, options)),
        scale,
        _plan(kernels, options, dtype, scaled=narrow is not None),
        None if extra is None else as_rows(extra),
    )
    if options.has_targets:
        parts = (image, text, extra)
        if options.normalize:
            parts = (None if x is None else F.normalize(x, dim=-1) for x in parts)
        loss = loss + scale * corrections(*parts, options)
    if options.reduction == "mean":
        loss = contrastive_autograd.joined_mean(loss, ranks)
    if isinstance(logit_bias, Tensor):
        # the bias moves all logits alike: its gradient is zero, not missing
        loss = loss + 0 * as_scalar(logit_bias, loss)
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
    options: Options,
) -> Tensor:
    dtype = contrastive_narrow.tile_dtype(image_features)
    loss = siglip_autograd.siglip_losses if options.reduction == "none" else siglip_autograd.siglip_share
    return loss(
        as_rows(image_features),
        as_rows(texts_of(text_features, options)),
        as_scalar(logit_scale, image_features),
        as_scalar(logit_bias, image_features),
        _plan(kernels, options, dtype, scaled=dtype is not None),
    )


def as_rows(features: Tensor) -> Tensor:
    """Return features as the kernels read them: the last dimension contiguous, no two rows in one place."""
    in_place = features.stride(1) == 1 and features.stride(0) >= features.shape[1]
    return features if in_place else features.contiguous()


def native_refusal(op: str, image_features: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Return why the op library's kernels cannot serve a loss, or None; ``dtype`` is the tiles' if it is another."""
    if contrastive_kernels.native is None:
        return contrastive_kernels.native_unavailable
    if image_features.device.type not in contrastive_kernels.native_devices:
        return f"the op library has no kernels for {image_features.device.type}"
    return contrastive_cuda.refusal(op, image_features, dtype) if image_features.is_cuda else None


def _refusal(op: str, image_features: Tensor, *_: object) -> str | None:
    return native_refusal(op, image_features, contrastive_narrow.tile_dtype(image_features))


def native_kernels(image_features: Tensor) -> contrastive_kernels.Kernels:
    """Return the op library's kernels for the features' device."""
    return contrastive_cuda.kernels if image_features.is_cuda else contrastive_kernels.native


def _native(*arguments: Any) -> Any:
    return _tiled(native_kernels(arguments[0]), *arguments)


def _siglip_native(*arguments: Any) -> Any:
    return _siglip_tiled(native_kernels(arguments[0]), *arguments)


def _chunked(*arguments: Any) -> Any:
    announce_chunks("contrastive_loss", arguments[0])
    return _tiled(contrastive_kernels.chunked, *arguments)


def _siglip_chunked(*arguments: Any) -> Any:
    announce_chunks("siglip_loss", arguments[0])
    return _siglip_tiled(contrastive_kernels.chunked, *arguments)


def announce_chunks(op: str, image_features: Tensor) -> None:
    """Warn once that PyTorch's tiles stand in for the op library's."""
    # torch.compile, under which nothing is said, cannot trace what looks into files
    if torch.compiler.is_compiling():
        return
    reason = _refusal(op, image_features)
    # a kernel that failed has been announced
    if reason is None or fallback.failure(op, image_features.device) is not None:
        return
    if reason == library.unavailable():
        library_notice.tell()
    else:
        dispatch.announce_slower("contrastive losses", reason, _words_of_chunks)


def _words_of_chunks(reason: str) -> str:
    return f"run in chunks in PyTorch: {library_notice.words_of_cuda(reason)}"


for _op, _implementations in (
    ("contrastive_loss", (_native, _chunked, contrastive_reference.contrastive_loss)),
    ("siglip_loss", (_siglip_native, _siglip_chunked, contrastive_reference.siglip_loss)),
):
    dispatch.register(
        _op,
        prepare,
        dispatch.Implementation(
            "native", "tiles in the op library", _implementations[0], functools.partial(_refusal, _op)
        ),
        dispatch.Implementation("torch", "tiles in PyTorch", _implementations[1]),
        # never for its speed: it holds all logits
        dispatch.Implementation("reference", "all logits at once, in PyTorch", _implementations[2], planned=False),
    )
