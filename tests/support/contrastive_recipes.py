"""CLIP's loss with other targets and columns, by PyTorch's cross-entropy over all logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Keywords of a loss, as `recipe` makes them of a batch.
RECIPES = ("smoothed", "grouped", "extra", "grouped and smoothed", "extra and smoothed", "all three")


def recipe(name: str, batch: int, extra: Tensor | None = None) -> dict[str, object]:
    """Return the keywords of a recipe for so many pairs; ``extra`` serves those that have extra texts."""
    options: dict[str, object] = {}
    if "smoothed" in name or name == "all three":
        options["label_smoothing"] = 0.1
    if "grouped" in name or name == "all three":
        # groups of one and of several, ids in no order
        options["groups"] = torch.arange(batch).square() % 11 - 3
    if "extra" in name or name == "all three":
        options["extra_text_features"] = extra
    return options


def plain_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | float = 0.0,
    *,
    label_smoothing: float = 0.0,
    groups: Tensor | None = None,
    extra_text_features: Tensor | None = None,
    reduction: str = "mean",
    normalize: bool = False,
) -> Tensor:
    """Return the loss by ``F.cross_entropy`` of all logits with the targets as probabilities, in the dtype given."""
    columns = text if extra_text_features is None else torch.cat([text, extra_text_features])
    if normalize:
        image, text, columns = (F.normalize(x, dim=-1) for x in (image, text, columns))
    batch = len(image)
    groups = torch.arange(batch, device=image.device) if groups is None else groups
    together = (groups[:, None] == groups).to(image.dtype)
    target = together / together.sum(1, keepdim=True)
    losses = (
        F.cross_entropy(logits + logit_bias, probabilities, reduction="none", label_smoothing=label_smoothing)
        for logits, probabilities in (
            (logit_scale * image @ columns.T, F.pad(target, (0, len(columns) - batch))),
            (logit_scale * text @ image.T, target),
        )
    )
    loss = sum(losses) / 2
    return loss if reduction == "none" else loss.mean()


def plain_distillation(
    image: Tensor, text: Tensor, scale: Tensor, u: Tensor, v: Tensor, teacher_scale: float
) -> tuple[Tensor, Tensor]:
    """Return open_clip's pair of losses by its formulas: contrastive, and cross-entropy with the teacher's softmax."""
    contrastive = plain_loss(image, text, scale)
    student, teacher = scale * image @ text.T, teacher_scale * u @ v.T
    directions = ((student, teacher), (student.T, teacher.T))
    return contrastive, sum(-(t.softmax(1) * x.log_softmax(1)).sum(1).mean() for x, t in directions) / 2


def assert_all_as_exact(found: list[Tensor], reference: list[Tensor], exact: list[Tensor]) -> None:
    """Hold a loss and its gradients to the bound of every fast path."""
    for number, (mine, theirs, value) in enumerate(zip(found, reference, exact, strict=True)):
        # a scalar is a sum whose terms are of 1 at least
        scale = max(1.0, float(value.abs())) if value.dim() == 0 else None
        assert_as_exact_as_reference(mine, theirs, value, f"result {number} of shape {tuple(value.shape)}", scale)


class Largest(TorchDispatchMode):
    """Notes the most entries that the result of any operator has."""

    entries = 0

    def __torch_dispatch__(self, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Run an operator and look at what it gives."""
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.entries = max(self.entries, x.numel())
        return out
