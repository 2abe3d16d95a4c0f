"""The distillation loss as a module: open_clip's values, call and subclasses."""

from __future__ import annotations

from collections.abc import Callable

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipfast

BASES = (clipfast.DistillClipLoss, open_clip.loss.DistillClipLoss)


def with_margin(base: type) -> Callable[..., tuple[Tensor, Tensor]]:
    def get_logits(self: object, *args: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(x - 0.1 * torch.eye(len(x)) for x in base.get_logits(self, *args))

    return get_logits


def squared(base: type) -> Callable[..., Tensor]:
    return lambda self, teacher_logits, student_logits: (teacher_logits - student_logits).square().mean()


CHANGES = {"get_logits": with_margin, "dist_loss": squared}


def features(dtype: torch.dtype = torch.float64) -> tuple:
    generator = torch.Generator().manual_seed(0)
    shapes = ((30, 24), (30, 24), (30, 10), (30, 10))
    image, text, u, v = (F.normalize(torch.randn(s, generator=generator).to(dtype), dim=-1) for s in shapes)
    return image, text, torch.tensor(14.3), u, v, 30.0


def test_the_module_is_open_clips() -> None:
    arguments = features()
    exact = open_clip.loss.DistillClipLoss()(*arguments)
    torch.testing.assert_close(clipfast.DistillClipLoss()(*arguments), exact, rtol=1e-12, atol=0)
    named = clipfast.DistillClipLoss()(*arguments, output_dict=True)
    assert list(named) == ["contrastive_loss", "distill_loss"]
    torch.testing.assert_close(tuple(named.values()), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", ["get_logits", "dist_loss"])
def test_what_subclasses_override_counts(change: str) -> None:
    arguments = features()
    mine, theirs = (type("Changed", (base,), {change: CHANGES[change](base)}) for base in BASES)
    expected = theirs()(*arguments)
    assert not torch.allclose(expected[1], BASES[1]()(*arguments)[1])
    torch.testing.assert_close(mine()(*arguments), expected, rtol=1e-12, atol=0)


def test_two_dtypes_under_autocast() -> None:
    image, text, scale, *teacher, factor = features(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = clipfast.DistillClipLoss()(image.bfloat16(), text, scale, teacher[0], teacher[1].bfloat16(), factor)
    exact = clipfast.DistillClipLoss()(image, text, scale, *teacher, factor)
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0)
