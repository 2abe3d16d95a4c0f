"""Smoothed labels, groups of pairs and extra texts in the tiles, against PyTorch's cross-entropy of all logits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import BACKENDS, TILED
from contrastive_recipes import RECIPES, Largest, assert_all_as_exact, plain_loss, recipe
from torch import Tensor

from clipfast import ops
from clipfast.ops import contrastive_kernels


def batch_of(size: int, extra: int, width: int, dtype: torch.dtype, *, length: float = 1.0) -> list[Tensor]:
    """Return images, texts that are partly aligned with them, and extra texts that are partly aligned with some."""
    generator = torch.Generator().manual_seed(size + extra)
    image, noise = (torch.randn(size, width, generator=generator, dtype=torch.float64) for _ in range(2))
    near = image[torch.arange(extra) % size] + torch.randn(extra, width, generator=generator, dtype=torch.float64)
    return [(length * F.normalize(x, dim=-1)).to(dtype) for x in (image, image + noise, near)]


def numbers(
    loss: Callable[..., Tensor], features: list[Tensor], name: str, scale: float, **options: object
) -> list[Tensor]:
    """Return a loss, weighted where it has several values, and all its gradients."""
    leaves = [x.detach().clone().requires_grad_() for x in features]
    dtype = torch.promote_types(features[0].dtype, torch.float32)
    scalars = [torch.tensor(v, dtype=dtype, requires_grad=True) for v in (scale, -1.0)]
    image, text, extra = leaves
    value = loss(image, text, scalars[0], logit_bias=scalars[1], **recipe(name, len(image), extra), **options)
    weights = torch.arange(1, value.numel() + 1).to(value.dtype).reshape(value.shape) / value.numel()
    (value * weights).sum().backward()
    wanted = [*leaves[: 3 if "extra" in name or name == "all three" else 2], *scalars]
    return [value.detach(), *(x.grad for x in wanted)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", RECIPES)
def test_equal_to_cross_entropy(name: str, backend: str) -> None:
    for size, extra in ((1, 0), (1, 1), (2, 5), (67, 40)):
        for length, options in (
            (1.0, {}),
            (9.0, {}),
            (9.0, {"normalize": True}),
            (1.0, {"reduction": "none"}),
            (9.0, {"reduction": "none", "normalize": True}),
        ):
            features = batch_of(size, extra, 12, torch.float64, length=length)
            expected = numbers(plain_loss, features, name, 14.3, **options)
            with ops.backend(backend), warnings.catch_warnings():
                warnings.simplefilter("error")
                found = numbers(ops.contrastive_loss, features, name, 14.3, **options)
            for mine, theirs in zip(found, expected, strict=True):
                natural = max(1.0, float(theirs.abs().max()) if theirs.numel() else 0.0)
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12 * natural)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [14.3, 100.0])
@pytest.mark.parametrize("name", RECIPES)
def test_as_near_to_float64_as_the_reference(name: str, scale: float, dtype: torch.dtype, backend: str) -> None:
    for size, extra in ((67, 40), (300, 131)):
        features = batch_of(size, extra, 48, dtype)
        # the scale as the tested code sees it
        rounded = torch.tensor(scale).item()
        exact = numbers(plain_loss, [x.double() for x in features], name, rounded)
        with ops.backend("reference"):
            reference = numbers(ops.contrastive_loss, features, name, scale)
        with ops.backend(backend):
            found = numbers(ops.contrastive_loss, features, name, scale)
        assert_all_as_exact(found, reference, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_group_of_all_asks_for_nothing_but_evenness(backend: str) -> None:
    """Equal features in one group are what their targets say: no gradient is left."""
    image = torch.ones(6, 4).requires_grad_()
    text = torch.ones(6, 4).requires_grad_()
    with ops.backend(backend):
        loss = ops.contrastive_loss(image, text, 5.0, groups=torch.full((6,), 10**12))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(6), rel=1e-6)
    assert max(x.grad.abs().max() for x in (image, text)) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_recipes_that_say_nothing_change_no_bit(backend: str) -> None:
    image, text, extra = batch_of(40, 0, 16, torch.float32)
    with ops.backend(backend):
        usual, *_ = numbers(ops.contrastive_loss, [image, text, extra], "none of them", 14.3)
        empty = ops.contrastive_loss(image, text, 14.3, label_smoothing=0, extra_text_features=extra)
        alone = ops.contrastive_loss(image, text, 14.3, groups=torch.arange(40).int())
    assert torch.equal(usual, empty)
    torch.testing.assert_close(alone, usual, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_queue_gets_no_gradient(backend: str) -> None:
    image, text, extra = batch_of(40, 30, 16, torch.float64)
    image.requires_grad_()
    with ops.backend(backend):
        ops.contrastive_loss(image, text, 14.3, extra_text_features=extra, label_smoothing=0.2).backward()
    assert extra.grad is None
    expected = numbers(plain_loss, [image, text, extra], "extra", 14.3, label_smoothing=0.2)[1]
    torch.testing.assert_close(image.grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accuracy_counts_extra_texts_as_rivals(backend: str) -> None:
    image, text, extra = batch_of(60, 60, 8, torch.float32)
    with ops.backend(backend):
        _, found = ops.contrastive_loss(image, text, 9.0, return_accuracy=True, extra_text_features=extra)
    label = torch.arange(60)
    logits = image @ torch.cat([text, extra]).T
    assert found.image_to_text == (logits.argmax(1) == label).float().mean()
    assert found.text_to_image == (logits[:, :60].argmax(0) == label).float().mean()
    assert found.image_to_text < (logits[:, :60].argmax(1) == label).float().mean()


@pytest.mark.parametrize("backend", TILED)
def test_autocast_changes_nothing(backend: str) -> None:
    features = batch_of(70, 40, 32, torch.float32)
    with ops.backend(backend):
        expected = numbers(ops.contrastive_loss, features, "all three", 100.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = numbers(ops.contrastive_loss, features, "all three", 100.0)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_the_same_twice(dtype: torch.dtype, backend: str) -> None:
    features = batch_of(500, 300, 32, dtype)
    with ops.backend(backend):
        first, second = (numbers(ops.contrastive_loss, features, "all three", 100.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", TILED)
def test_compiled_whole(backend: str) -> None:
    features = batch_of(70, 40, 32, torch.float32)
    with ops.backend(backend):
        eager = numbers(ops.contrastive_loss, features, "all three", 14.3)
        torch.compiler.reset()
        compiled = torch.compile(ops.contrastive_loss, fullgraph=True, backend="aot_eager")
        found = numbers(compiled, features, "all three", 14.3)
    for mine, theirs in zip(found, eager, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", TILED)
def test_not_a_number_is_not_hidden(backend: str) -> None:
    for place in range(3):
        features = batch_of(20, 10, 8, torch.float32)
        features[place][5, 3] = math.nan
        with ops.backend(backend):
            assert numbers(ops.contrastive_loss, features, "all three", 14.3)[0].isnan()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing\): got 1.0, expected .* below 1"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing\): got -0.1"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing\): got nan"),
        ({"label_smoothing": "0.1"}, TypeError, r"label_smoothing\): got '0.1', expected a number"),
        ({"label_smoothing": True}, TypeError, r"label_smoothing\): got True"),
        ({"groups": [0, 1, 2]}, TypeError, r"groups\): got list, expected a tensor of integers"),
        ({"groups": torch.zeros(3)}, TypeError, r"groups\): got torch.float32"),
        ({"groups": torch.zeros(3, dtype=torch.bool)}, TypeError, r"groups\): got torch.bool"),
        ({"groups": torch.zeros(4, dtype=torch.long)}, ValueError, r"groups\): got shape \(4,\), expected \[3\]"),
        ({"groups": torch.zeros(3, 1, dtype=torch.long)}, ValueError, r"groups\): got shape \(3, 1\)"),
        ({"groups": torch.zeros(3, dtype=torch.long, device="meta")}, ValueError, r"groups\): got device meta"),
        ({"extra_text_features": [1.0]}, TypeError, r"extra_text_features\): got list"),
        ({"extra_text_features": torch.zeros(2, 4)}, ValueError, r"got shape \(2, 4\), expected \[M, 2\]"),
        ({"extra_text_features": torch.zeros(2)}, ValueError, r"extra_text_features\): got shape \(2,\)"),
        ({"extra_text_features": torch.zeros(2, 2).double()}, TypeError, "got dtype torch.float64, expected torch.flo"),
        ({"extra_text_features": torch.zeros(2, 2, device="meta")}, ValueError, "got device meta, expected cpu"),
    ],
)
def test_wrong_recipes(options: dict, error: type[Exception], message: str) -> None:
    for backend in BACKENDS[:2]:
        with pytest.raises(error, match=message), ops.backend(backend):
            ops.contrastive_loss(torch.ones(3, 2), torch.ones(3, 2), 1.0, **options)


def test_no_block_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that operators give, forward and backward, has a tile's entries or a batch of features' at most."""
    monkeypatch.setattr(contrastive_kernels, "ROWS", 64)
    monkeypatch.setattr(contrastive_kernels, "COLUMNS", 64)
    size, extra, width = 640, 320, 8
    features = batch_of(size, extra, width, torch.float32)
    for backend, bound in (("torch", (size + extra) * width), ("reference", None)):
        # the tiles themselves run below the mode: as operators they are one call
        chunked = contrastive_kernels.Kernels(*contrastive_kernels._CHUNKED)
        monkeypatch.setattr(contrastive_kernels, "chunked", chunked)
        with Largest() as seen, ops.backend(backend):
            numbers(ops.contrastive_loss, features, "all three", 14.3)
        if bound is None:
            assert seen.entries >= size * (size + extra), "the specification's block is seen"
        else:
            assert seen.entries <= bound
