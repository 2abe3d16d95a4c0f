"""The loss modules: open_clip's values and gradients on one rank, the joined batch's on several."""

from __future__ import annotations

import math

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from contrastive_recipes import RECIPES, plain_loss, recipe
from oracle import relative_error
from torch import Tensor

import clipfast

LOSSES = {
    "contrastive": (clipfast.ContrastiveLoss, open_clip.loss.ClipLoss),
    "siglip": (clipfast.SigLipLoss, open_clip.loss.SigLipLoss),
}


def features(batch: int = 6, width: int = 5) -> list[Tensor]:
    torch.manual_seed(0)
    both = [F.normalize(torch.randn(batch, width, dtype=torch.float64), dim=-1) for _ in range(2)]
    scale, bias = torch.tensor(14.3, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    return [t.requires_grad_() for t in (*both, scale, bias)]


@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_of_open_clip(name: str) -> None:
    mine, theirs = LOSSES[name]
    results = []
    for loss in (mine(), theirs()):
        inputs = features()
        value = loss(*inputs)
        value.backward()
        results.append([value, *(t.grad for t in inputs[:3])])
        assert torch.equal(loss(*inputs, output_dict=True)["contrastive_loss"], value)
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    assert torch.autograd.gradcheck(LOSSES[name][0](), features(4, 3), atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_get_float32_logits(dtype: torch.dtype) -> None:
    image, text, _, _ = (t.detach().to(dtype) for t in features(32, 16))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = clipfast.ContrastiveLoss()(image, text, torch.tensor(100.0))
        exact = clipfast.ContrastiveLoss()(image.double(), text.double(), torch.tensor(100.0).double())
        assert value.dtype == torch.float32
        assert relative_error(value, exact) < 1e-6


def test_known_values() -> None:
    eye = torch.eye(4, dtype=torch.float64)
    # each row has one logit of 2 and three of 0
    expected = math.log(math.exp(2) + 3) - 2
    assert math.isclose(clipfast.ContrastiveLoss()(eye, eye, 2.0).item(), expected, rel_tol=1e-14)
    assert clipfast.ContrastiveLoss()(eye[:1], eye[:1], 2.0).item() == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({0: torch.zeros(5, 5).double()}, ValueError, r"got shape \(6, 5\), expected \(5, 5\)"),
        ({0: torch.zeros(6, 5)}, TypeError, "got dtype torch.float64, expected torch.float32"),
        ({0: torch.zeros(6, 5).long()}, TypeError, r"image_features\): got torch.int64"),
        ({0: torch.zeros(0, 5).double(), 1: torch.zeros(0, 5).double()}, ValueError, "B of at least 1"),
        ({2: torch.tensor(math.nan)}, ValueError, r"logit_scale\): got nan"),
        ({2: -1.0}, ValueError, r"logit_scale\): got -1.0, expected a number of at least 0"),
        ({2: torch.ones(2)}, ValueError, r"logit_scale\): got shape \(2,\), expected a scalar"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_wrong_input(name: str, change: dict, error: type[Exception], message: str) -> None:
    inputs = [change.get(i, t.detach()) for i, t in enumerate(features())]
    with pytest.raises(error, match=message):
        LOSSES[name][0]()(*inputs)


def test_flags_that_would_give_wrong_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match="wrong gradients.*gather_with_grad=True"):
        clipfast.ContrastiveLoss(local_loss=True, rank=0, world_size=2)
    clipfast.ContrastiveLoss(local_loss=True)
    with pytest.raises(ValueError, match="use_horovod"):
        clipfast.ContrastiveLoss(use_horovod=True)
    with pytest.raises(ValueError, match="dist_impl.*'star'"):
        clipfast.SigLipLoss(dist_impl="star")


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"world_size=2.*no process group"):
        clipfast.ContrastiveLoss(world_size=2)(*features())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_features_of_two_dtypes_under_autocast(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    # a tower that ends in a product under autocast gives half precision, one that ends in a norm does not
    mine, theirs = LOSSES[name]
    image, text, scale, bias = (t.detach() for t in features(32, 16))
    pair = [f.to(dtype).requires_grad_() for f, dtype in zip((image, text), dtypes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        value = mine()(*pair, scale.float(), bias.float())
        assert torch.isfinite(theirs()(*pair, scale.float(), bias.float()))
    value.backward()
    exact = [f.detach().double().requires_grad_() for f in pair]
    expected = mine()(*exact, scale, bias)
    expected.backward()
    assert relative_error(value, expected) < 1e-6
    for mixed, f in zip(pair, exact, strict=True):
        assert mixed.grad.dtype == mixed.dtype
        assert relative_error(mixed.grad, f.grad) < (1e-5 if mixed.dtype == torch.float32 else 1e-2)


class _Margin:
    """A margin taken off each pair's own logit."""

    def get_logits(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        per_image, per_text = super().get_logits(*args, **kwargs)
        own = 0.5 * torch.eye(*per_image.shape, dtype=per_image.dtype)
        return per_image - own, per_text - own


class _Shifted:
    """Pairs that lie one row apart."""

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        return super().get_ground_truth(device, num_logits).roll(1)


@pytest.mark.parametrize("change", [_Margin, _Shifted])
def test_what_subclasses_override_counts(change: type) -> None:
    results = []
    for base in LOSSES["contrastive"]:
        loss = type("Changed", (change, base), {})()
        inputs = features()
        value = loss(*inputs)
        value.backward()
        results.append([value, *(t.grad for t in inputs[:3])])
        assert torch.equal(loss(*features(), output_dict=True)["contrastive_loss"], value)
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-12
    assert relative_error(results[0][0], clipfast.ContrastiveLoss()(*features())) > 1e-3


def test_a_patched_instance_counts() -> None:
    loss = clipfast.ContrastiveLoss()
    plain = loss.get_logits
    loss.get_logits = lambda *args, **kwargs: tuple(2 * x for x in plain(*args, **kwargs))
    image, text, scale, _ = features()
    assert relative_error(loss(image, text, scale), clipfast.ContrastiveLoss()(image, text, 2 * scale)) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_those_of_open_clip(bias: bool) -> None:
    inputs = [t.detach() for t in features()[: 4 if bias else 3]]
    for mine, theirs in zip(*(base().get_logits(*inputs) for base in LOSSES["contrastive"]), strict=True):
        assert relative_error(mine, theirs) < 1e-13


def test_siglips_loss_refuses_what_it_would_not_call() -> None:
    with pytest.raises(TypeError, match="subclass with get_logits"):
        type("Changed", (clipfast.SigLipLoss,), {"get_logits": lambda self: None})()


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    image, text, extra = (F.normalize(torch.randn(n, 8, dtype=torch.float64), dim=-1) for n in (20, 20, 9))
    options = recipe(name, 20, extra)
    expected = plain_loss(image, text, 14.3, **options)
    loss = clipfast.ContrastiveLoss(label_smoothing=options.pop("label_smoothing", 0.0))
    torch.testing.assert_close(loss(image, text, 14.3, **options), expected, rtol=1e-12, atol=0)
    named = loss(image, text, 14.3, output_dict=True, **options)
    torch.testing.assert_close(named["contrastive_loss"], expected, rtol=1e-12, atol=0)


def test_extra_texts_of_another_dtype_under_autocast() -> None:
    image, text, extra = (F.normalize(torch.randn(n, 8), dim=-1) for n in (20, 20, 9))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = clipfast.ContrastiveLoss()(image, text, 14.3, extra_text_features=extra.bfloat16())
    exact = clipfast.ContrastiveLoss()(image, text, 14.3, extra_text_features=extra)
    torch.testing.assert_close(mixed, exact, rtol=0.01, atol=0)


def test_a_loss_with_logits_of_its_own_smooths_and_refuses_the_rest() -> None:
    class Doubled(clipfast.ContrastiveLoss):
        def get_logits(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
            return tuple(2 * x for x in super().get_logits(*args, **kwargs))

    image, text = (F.normalize(torch.randn(9, 8), dim=-1) for _ in range(2))
    smoothed = Doubled(label_smoothing=0.2)(image, text, 3.0)
    torch.testing.assert_close(smoothed, clipfast.ContrastiveLoss(label_smoothing=0.2)(image, text, 6.0))
    for name, given in (("groups", torch.arange(9)), ("extra_text_features", text)):
        with pytest.raises(ValueError, match=rf"ContrastiveLoss\({name}\): got some for a loss with logits"):
            Doubled()(image, text, 3.0, **{name: given})
    with pytest.raises(ValueError, match=r"ContrastiveLoss\(label_smoothing\): got 1.5"):
        clipfast.ContrastiveLoss(label_smoothing=1.5)
