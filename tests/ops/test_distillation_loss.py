"""The distillation loss in tiles, against open_clip's formulas over all logits."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import BACKENDS, TILED
from contrastive_recipes import Largest, assert_all_as_exact, plain_distillation
from torch import Tensor

from clipfast import ops
from clipfast.ops import contrastive_kernels


def batch_of(size: int, dtype: torch.dtype, length: float = 1.0) -> list[Tensor]:
    """Return a student's images and texts, partly aligned, and a teacher's of another width."""
    generator = torch.Generator().manual_seed(size)
    features = []
    for width in (24, 10):
        image, noise = (torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(2))
        features += [length * F.normalize(x, dim=-1) for x in (image, image + noise)]
    return [x.to(dtype) for x in features]


def numbers(loss: object, features: list[Tensor], scale: float, weights: tuple[float, float] = (0.5, 2.0)) -> list:
    """Return both losses and the gradients of their weighted sum."""
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    image, text = (x.detach().clone().requires_grad_() for x in features[:2])
    factor = torch.tensor(scale, dtype=dtype, requires_grad=True)
    losses = loss(image, text, factor, *features[2:], 30.0)
    sum(w * x for w, x in zip(weights, losses, strict=True)).backward()
    return [*(x.detach() for x in losses), image.grad, text.grad, factor.grad]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_equal_to_open_clips_formulas(weights: tuple[float, float], backend: str) -> None:
    for size, length in ((1, 1.0), (2, 1.0), (67, 1.0), (67, 7.0)):
        features = batch_of(size, torch.float64, length)
        expected = numbers(plain_distillation, features, 14.3, weights)
        with ops.backend(backend):
            found = numbers(ops.distillation_loss, features, 14.3, weights)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_as_near_to_float64_as_the_reference(scale: float, dtype: torch.dtype, backend: str) -> None:
    for size in (67, 300):
        features = batch_of(size, dtype)
        exact = numbers(plain_distillation, [x.double() for x in features], torch.tensor(scale).item())
        with ops.backend("reference"):
            reference = numbers(ops.distillation_loss, features, scale)
        with ops.backend(backend):
            found = numbers(ops.distillation_loss, features, scale)
        assert_all_as_exact(found, reference, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_student_that_is_its_teacher_has_no_gradient_left(backend: str) -> None:
    image, text, *_ = (x.requires_grad_() for x in batch_of(20, torch.float64))
    with ops.backend(backend):
        losses = ops.distillation_loss(image, text, 9.0, image.detach(), text.detach(), 9.0)
    losses.distill.backward()
    assert max(x.grad.abs().max() for x in (image, text)) < 1e-14
    assert 0 < losses.distill != losses.contrastive


@pytest.mark.parametrize("backend", TILED)
def test_a_teacher_in_another_precision(backend: str) -> None:
    image, text, *teacher = batch_of(50, torch.float32)
    half = [x.bfloat16() for x in teacher]
    expected = numbers(plain_distillation, [image.double(), text.double(), *(x.double() for x in half)], 14.3)
    with ops.backend(backend):
        found = numbers(ops.distillation_loss, [image, text, *half], 14.3)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", TILED)
def test_compiled_whole_and_under_autocast(backend: str) -> None:
    features = batch_of(70, torch.float32)
    with ops.backend(backend):
        eager = numbers(ops.distillation_loss, features, 14.3)
        with torch.autocast("cpu", torch.bfloat16):
            autocast = numbers(ops.distillation_loss, features, 14.3)
        torch.compiler.reset()
        compiled = torch.compile(ops.distillation_loss, fullgraph=True, backend="aot_eager")
        found = numbers(compiled, features, 14.3)
    assert all(torch.equal(a, b) for a, b in zip(autocast, eager, strict=True))
    for mine, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_opcheck() -> None:
    image, text, u, v = batch_of(9, torch.bfloat16)
    t = torch.tensor(9.0)
    row_lse, column_lse, *_ = contrastive_kernels.chunked.statistics(u, v, t, None, None, 0)
    arguments = (image, text, u, v, t, row_lse, column_lse)
    torch.library.opcheck(torch.ops.clipfast.distillation_products.default, arguments)


def test_no_block_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_kernels, "ROWS", 64)
    monkeypatch.setattr(contrastive_kernels, "COLUMNS", 64)
    monkeypatch.setattr(contrastive_kernels, "chunked", contrastive_kernels.Kernels(*contrastive_kernels._CHUNKED))
    features = batch_of(640, torch.float32)
    most = {}
    for backend in ("torch", "reference"):
        with Largest() as seen, ops.backend(backend):
            numbers(ops.distillation_loss, features, 14.3)
        most[backend] = seen.entries
    assert most["torch"] <= 640 * 24
    assert most["reference"] >= 640 * 640, "the specification's block is seen"


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("teacher", "error", "message"),
    [
        ((torch.ones(4, 5), X, 1.0), ValueError, r"teacher_image_features\): got shape \(4, 5\), expected \[3, E\]"),
        ((X, torch.ones(3), 1.0), ValueError, r"teacher_text_features\): got shape \(3,\)"),
        ((X, torch.ones(3, 5), 1.0), ValueError, r"teacher_text_features\): got \(3, 5\) in torch.float32"),
        ((X.long(), X.long(), 1.0), TypeError, r"teacher_image_features\): got torch.int64"),
        ((None, X, 1.0), TypeError, r"teacher_image_features\): got NoneType"),
        ((X.to("meta"), X.to("meta"), 1.0), ValueError, r"got device meta, expected cpu"),
        ((X, X, -1.0), ValueError, r"teacher_logit_scale\): got -1.0"),
        ((X, X, torch.ones(2)), ValueError, r"teacher_logit_scale\): got shape \(2,\), expected a scalar"),
        ((X, X, math.nan), ValueError, r"teacher_logit_scale\): got nan"),
        ((X.clone().requires_grad_(), X, 1.0), ValueError, "got its image with requires_grad, expected none"),
        ((X, X, torch.ones((), requires_grad=True)), ValueError, "got its scale with requires_grad"),
    ],
)
def test_wrong_teachers(teacher: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.distillation_loss(X, X, 1.0, *teacher)
