"""CLIP's loss with a teacher's: a student's rows and columns of logits are drawn to those of another model.

The student's log-sum-exps are those of its contrastive loss, so that one costs nothing more. What is left,
``Σ τᵢⱼ·sᵢⱼ`` with the teacher's softmax ``τ``, is linear in the student's logits: ``s·Σᵢ Iᵢ·(τ·T)ᵢ``. A pass over tiles
of the teacher's logits gives ``τ·T`` and ``τᵀ·I``, of O(B·D), which are the gradients too.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipfast.ops import contrastive_autograd, contrastive_kernels, contrastive_reference, dispatch
from clipfast.ops.contrastive_arguments import Options, check_alike, check_scale, prepare
from clipfast.ops.contrastive_kernels import Kernels, accumulation_dtype
from clipfast.ops.contrastive_loss import (
    announce_chunks,
    as_rows,
    as_scalar,
    native_kernels,
    native_refusal,
)
from clipfast.ops.contrastive_plan import Plan
from clipfast.ops.contrastive_ranks import Ranks, meet
from clipfast.ops.contrastive_targets import joined_sum


class DistillationLosses(NamedTuple):
    """The contrastive loss of the student, and its cross-entropy with the teacher; scalars."""

    contrastive: Tensor
    distill: Tensor


class Teacher(NamedTuple):
    """What another model says of the same batch."""

    image: Tensor
    text: Tensor
    scale: Tensor | float


def distillation_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    *,
    group: dist.ProcessGroup | None = None,
    comm: Literal["gather", "ring"] = "gather",
    equal_batches: bool = False,
) -> DistillationLosses:
    """A student's contrastive loss, and its cross-entropy with a teacher's softmax over the same batch.

    ``distill = ½ · (CE(softmax(t·U·Vᵀ), s·I·Tᵀ) + CE(softmax(t·V·Uᵀ), s·T·Iᵀ))`` with the teacher's images U, texts V
    and factor t; rows are averaged. No B×B matrix is held, and memory is O(B·D).

    Args:
        image_features: ``[B, D]``, L2-normalised by the caller; any finite values are right.
        text_features: ``[B, D]``, in the dtype and on the device of ``image_features``.
        logit_scale: The factor s, a scalar tensor or a number ≥ 0.
        teacher_image_features: ``[B, E]``, of any width and floating-point dtype, without gradients.
        teacher_text_features: ``[B, E]``, in the dtype of ``teacher_image_features``.
        teacher_logit_scale: The factor t, likewise.
        group: As in :func:`clipfast.ops.contrastive_loss`.
        comm: As there, for the contrastive loss; the distillation gathers both models' texts.
        equal_batches: As there.

    Returns:
        A pair of scalars, in float32 at least.

    Raises:
        TypeError: Features that are not floating point, or differ in dtype.
        ValueError: Features of other shapes or devices, a factor that is not a scalar or negative or NaN, or a teacher
            that wants gradients: compute its features under ``torch.no_grad()``.

    Source: open_clip's ``DistillClipLoss``; Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
    """
    teacher = Teacher(teacher_image_features, teacher_text_features, teacher_logit_scale)
    options = Options(group, comm, "mean", False, equal_batches)
    return dispatch.call("distillation_loss", image_features, text_features, logit_scale, *teacher, options)


def _prepare(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor | float,
    teacher_image_features: Tensor,
    teacher_text_features: Tensor,
    teacher_logit_scale: Tensor | float,
    options: Options | None = None,
    **keywords: Any,
) -> tuple[Tensor, Tensor, Tensor | float, Teacher, Options]:
    teacher = Teacher(teacher_image_features, teacher_text_features, teacher_logit_scale)
    options = Options(None, "gather", "mean", False, False)._replace(**keywords) if options is None else options
    problem: Exception | None = None
    try:
        _check_teacher(teacher, image_features)
    except (TypeError, ValueError) as error:
        if options.group is None:
            raise
        problem = error
    image, text, scale, _, options = prepare(image_features, text_features, logit_scale, None, options, problem=problem)
    if options.group is not None:
        meet(teacher.image, teacher.text, options.group, equal_batches=options.equal_batches, problem=None)
    return image, text, scale, teacher, options


def _check_teacher(teacher: Teacher, image_features: Tensor) -> None:
    for name, x in (("teacher_image_features", teacher.image), ("teacher_text_features", teacher.text)):
        name = f"distillation_loss({name})"
        if not isinstance(x, Tensor) or not x.is_floating_point():
            came = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: got {came}, expected a tensor of floating-point numbers")
        if x.dim() != 2 or x.shape[0] != image_features.shape[0]:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected [{image_features.shape[0]}, E], a row for each pair"
            )
        check_alike(name, x, image_features, "device")
    if teacher.image.shape != teacher.text.shape or teacher.image.dtype != teacher.text.dtype:
        raise ValueError(
            f"distillation_loss(teacher_text_features): got {tuple(teacher.text.shape)} in {teacher.text.dtype}, "
            f"expected {tuple(teacher.image.shape)} in {teacher.image.dtype}, as teacher_image_features"
        )
    check_scale(teacher.scale, "distillation_loss(teacher_logit_scale)")
    wanting = [n for n, x in zip(Teacher._fields, teacher, strict=True) if isinstance(x, Tensor) and x.requires_grad]
    if wanting and torch.is_grad_enabled():
        raise ValueError(
            f"distillation_loss(teacher): got its {wanting[0]} with requires_grad, expected none: a teacher is not "
            f"trained here; compute its features under torch.no_grad()"
        )


def _reference(
    image: Tensor, text: Tensor, scale: Tensor | float, teacher: Teacher, options: Options
) -> DistillationLosses:
    """The specification: all logits of both models at once."""
    ranks = options.ranks
    image, text, u, v = (contrastive_reference.gather(x, ranks) for x in (image, text, teacher.image, teacher.text))
    logits = contrastive_reference.similarities(image, text, scale)
    of_teacher = contrastive_reference.similarities(u, v, teacher.scale)
    labels = torch.arange(logits.shape[0], device=logits.device)
    contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    directions = ((logits, of_teacher), (logits.T, of_teacher.T))
    # the product in the precision of the student's logits
    distill = sum(-(t.softmax(1).to(x.dtype) * x.log_softmax(1)).sum(1).mean() for x, t in directions) / 2
    return DistillationLosses(contrastive, distill)


def _tiled(
    kernels: Kernels, image: Tensor, text: Tensor, scale: Tensor | float, teacher: Teacher, options: Options
) -> DistillationLosses:
    scale, ranks, dtype = as_scalar(scale, image), options.ranks, None
    if image.dtype != scale.dtype:
        # two terms' gradients are added before they are rounded to 16 bits
        dtype = image.dtype
        image, text = image.to(scale.dtype), text.to(scale.dtype)
    image, text = as_rows(image), as_rows(text)
    plan = Plan(kernels, ranks, options.comm == "ring", dtype=dtype)
    losses, *_ = contrastive_autograd.contrastive_losses(image, text, scale, plan)
    contrastive = contrastive_autograd.joined_mean(losses, ranks)
    u, v = (as_rows(x.detach()) for x in (teacher.image, teacher.text))
    t = as_scalar(teacher.scale, u).detach()
    expected = _Expected.apply(image, text, u, v, t, kernels, ranks)
    batch = image.shape[0] if ranks is None else ranks.total
    change = joined_sum((image * text).sum() - expected, ranks) / batch
    return DistillationLosses(contrastive, contrastive + scale * change)


class _Expected(torch.autograd.Function):
    """``Σᵢⱼ τᵢⱼ·Iᵢ·Tⱼ`` over this rank's images and all texts; τ is the mean of the teacher's two softmaxes."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, u: Tensor, v: Tensor, t: Tensor, kernels: Kernels, ranks: Ranks | None
    ) -> Tensor:
        if ranks is not None:
            text, v = ranks.gather(text), ranks.gather(v)
        row_lse, column_lse, *_ = kernels.statistics(u, v, t, None, None, 0 if ranks is None else ranks.own.start)
        if ranks is not None:
            column_lse = ranks.join_lse(column_lse)
        of_texts, of_images = torch.ops.clipfast.distillation_products(image, text, u, v, t, row_lse, column_lse)
        ctx.ranks = ranks
        ctx.save_for_backward(of_texts, of_images)
        return (image * of_texts).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        of_texts, of_images = ctx.saved_tensors
        d_text = grad * of_images
        if ctx.ranks is not None:
            d_text = ctx.ranks.reduce_scatter(d_text)
        return grad * of_texts, d_text, None, None, None, None, None


def _products(
    image: Tensor, text: Tensor, u: Tensor, v: Tensor, t: Tensor, row_lse: Tensor, column_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``τ·T`` and ``τᵀ·I`` in the precision of sums, a tile of the teacher's logits at a time."""
    dtype = accumulation_dtype(image.dtype)
    of_texts, of_images = (x.new_zeros(x.shape, dtype=dtype) for x in (image, text))
    for i, j, product in contrastive_kernels.products(u, v):
        x = product.mul_(t)
        share = (x - row_lse[0, i, None]).sub_(row_lse[1, i, None]).exp_()
        share = share.add_(x.sub_(column_lse[0, j]).sub_(column_lse[1, j]).exp_()).mul_(0.5).to(dtype)
        with torch.autocast(image.device.type, enabled=False):
            of_texts[i] += share @ text[j].to(dtype)
            of_images[j] += share.T @ image[i].to(dtype)
    return of_texts, of_images


def _fake_products(image: Tensor, text: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(image.dtype)
    return tuple(x.new_empty(x.shape, dtype=dtype) for x in (image, text))


_definitions = torch.library.Library("clipfast", "FRAGMENT")
_definitions.define(f"distillation_products{torch.library.infer_schema(_products, mutates_args=())}")
_definitions.impl("distillation_products", _products, "CompositeExplicitAutograd")
torch.library.register_fake("clipfast::distillation_products", _fake_products, lib=_definitions)


def _native_refusal(image: Tensor, text: Tensor, scale: object, teacher: Teacher, options: Options) -> str | None:
    return native_refusal("contrastive_loss", image) or native_refusal("contrastive_loss", teacher.image)


def _native(image: Tensor, *rest: Any) -> DistillationLosses:
    return _tiled(native_kernels(image), image, *rest)


def _chunked(image: Tensor, *rest: Any) -> DistillationLosses:
    announce_chunks("contrastive_loss", image)
    return _tiled(contrastive_kernels.chunked, image, *rest)


dispatch.register(
    "distillation_loss",
    _prepare,
    dispatch.Implementation("native", "tiles in the op library, the teacher's in PyTorch", _native, _native_refusal),
    dispatch.Implementation("torch", "tiles in PyTorch", _chunked),
    # never for its speed: it holds all logits
    dispatch.Implementation("reference", "all logits at once, in PyTorch", _reference, planned=False),
)
