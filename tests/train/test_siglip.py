"""Training with the sigmoid loss: its gradients, its settings, and what a run of it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from train_runs import assert_same_end, make_place, train

import clipfast
from clipfast.evaluate.probabilities import sigmoid_of
from clipfast.models.open_model import open_model
from clipfast.train.config import TrainConfig
from clipfast.train.gradients import StepSeeds, compute_gradients
from clipfast.train.towers import Towers
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
}
SIGMOID = TINY | {"init_logit_scale": math.log(10), "init_logit_bias": -10}
ALONE = Workplace(torch.device("cpu"))


def model_of(config: dict, dtype: torch.dtype = torch.float32) -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.create_model(config, dtype=dtype)


def pairs(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 38, (10, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(10, 3, 16, 16, generator=generator, dtype=dtype), tokens


def formula(model: clipfast.CLIP, images: Tensor, tokens: Tensor) -> Tensor:
    """The loss as the paper writes it."""
    image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * image @ text.T + model.logit_bias
    signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
    return -F.logsigmoid(signs * logits).sum() / len(logits)


# --- one step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 3, 5, 9])
def test_gradients_by_parts_are_those_of_the_formula(size):
    model, batch = model_of(SIGMOID, torch.float64), pairs(dtype=torch.float64)
    towers = Towers(model, "fp32", ALONE)
    found = compute_gradients(towers, *batch, StepSeeds(0, 0, 0), micro_batch_size=size, loss="siglip", loss_factor=2.0)
    gradients = {n: p.grad / 2 for n, p in model.named_parameters()}
    model.zero_grad()
    expected = formula(model, *batch)
    expected.backward()
    torch.testing.assert_close(found.loss, expected.detach(), rtol=1e-12, atol=0)
    assert (found.logit_scale.item(), found.logit_bias.item()) == pytest.approx((10.0, -10.0), rel=1e-7)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)
    assert model.logit_bias.grad.abs() > 1e-3


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_every_precision_learns_as_float32_does(precision, size):
    losses = {}
    for kind in ("fp32", precision):
        config = TrainConfig(12, learning_rate=1e-2, warmup_steps=0, precision=kind, micro_batch_size=size)
        trainer = Trainer(model_of(SIGMOID), config)
        # with PyTorch's first scale, 65,536, fp16 skips some steps
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=kind == "fp16")
        losses[kind] = [trainer.take_step(*pairs()).loss for _ in range(12)]
    assert losses["fp32"][-1] < 0.5 * losses["fp32"][0]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.1)


def test_the_loss_is_the_models_unless_another_is_wanted():
    assert Trainer(model_of(TINY), TrainConfig(1)).loss == "clip"
    assert Trainer(model_of(SIGMOID), TrainConfig(1)).loss == "siglip"
    with pytest.raises(ValueError, match="loss: got 'siglip' and a model without logit_bias, expected one made with"):
        Trainer(model_of(TINY), TrainConfig(1, loss="siglip"))
    with pytest.raises(ValueError, match="label_smoothing: got 0.1 with the sigmoid loss"):
        Trainer(model_of(SIGMOID), TrainConfig(1, label_smoothing=0.1))
    with pytest.raises(ValueError, match="distill_model: got a teacher with the sigmoid loss"):
        Trainer(model_of(SIGMOID), TrainConfig(1), teacher=model_of(TINY))


def test_a_softmax_leaves_the_bias_alone():
    steps = []
    for config in (TINY, SIGMOID):
        model = model_of(config)
        with torch.no_grad():
            model.logit_scale.fill_(2.0)
        trainer = Trainer(model, TrainConfig(3, loss="clip", weight_decay=0.5, ema_decay=0.5))
        steps.append([trainer.take_step(*pairs(seed)).loss for seed in range(3)])
    assert steps[0] == steps[1]
    assert trainer.frozen["logit_bias"].item() == -10.0
    assert "logit_bias" not in trainer.ema


def test_scale_and_bias_do_not_decay_and_the_scale_has_no_bound():
    model = model_of(SIGMOID)
    with torch.no_grad():
        # published ones go to 117 and beyond
        model.logit_scale.fill_(math.log(117))
    trainer = Trainer(model, TrainConfig(1, learning_rate=1e-9, weight_decay=0.9, warmup_steps=0))
    for group in trainer.optimizer.param_groups:
        if any(p is model.logit_scale or p is model.logit_bias for p in group["params"]):
            assert group["weight_decay"] == 0
    trainer.take_step(*pairs())
    assert model.logit_scale.item() == pytest.approx(math.log(117), rel=1e-6)
    assert model.logit_bias.item() == pytest.approx(-10.0, rel=1e-6)


def test_a_step_that_is_not_finite_changes_nothing():
    trainer = Trainer(model_of(SIGMOID), TrainConfig(4, learning_rate=1e-2, ema_decay=0.5))
    trainer.take_step(*pairs())
    before = {n: t.clone() for n, t in trainer.state().items()}
    images, tokens = pairs(1)
    images[2] = torch.inf
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        trainer.take_step(images, tokens)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state().items())


# --- a run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_run_of_any_model(place, tmp_path):
    held_out = {"val_data": str(place / "held_out"), "val_every": 3}
    result, said = train(place, tmp_path / "whole", loss="siglip", ema_decay=0.5, tensorboard=True, **held_out)
    assert ", sigmoid loss" in said
    assert "scale 10.0, bias -10.0" in said
    first, *_, last = lines_of(tmp_path / "whole")
    assert (first["logit_scale"], first["logit_bias"]) == pytest.approx((10.0, -10.0))
    assert last["logit_bias"] != -10.0
    # the averages are written, but the model that was looked at is the last one
    model = open_model(tmp_path / "whole", device="cpu")
    assert model.config.init_logit_bias == -10.0
    assert sigmoid_of(model).bias == pytest.approx(-10.0, abs=0.1)
    assert result.metrics["val_loss"] > 0
    # stopped and gone on with, it ends with the same bits
    train(place, tmp_path / "parts", loss="siglip", ema_decay=0.5, steps=4, warmup_steps=2, schedule="constant")
    train(place, tmp_path / "parts", loss="siglip", ema_decay=0.5, schedule="constant")
    train(place, tmp_path / "one", loss="siglip", ema_decay=0.5, schedule="constant")
    assert_same_end(tmp_path / "parts", tmp_path / "one")


def test_a_softmax_has_no_bias_in_its_log(place, tmp_path):
    _, said = train(place, tmp_path, steps=1, warmup_steps=1)
    assert ", fp32\n" in said
    assert ", bias" not in said
    assert "logit_bias" not in lines_of(tmp_path)[0]


def test_the_held_out_loss_is_the_runs(place, tmp_path):
    result, _ = train(place, tmp_path, loss="siglip", steps=2, val_data=str(place / "held_out"), micro_batch_size=4)
    model = open_model(tmp_path, device="cpu")
    from clipfast.data.sources import open_pairs
    from clipfast.data.transform import image_transform, load_image

    source = open_pairs(place / "held_out")
    read = [source.read(i) for i in range(len(source))]
    images = torch.stack([image_transform(16)(load_image(p.image)) for p in read])
    tokens = clipfast.tokenize([p.caption for p in read], context_length=8)
    assert result.metrics["val_loss"] == pytest.approx(formula(model, images, tokens).item(), rel=1e-5)


def test_weights_of_either_loss_begin_a_run_of_the_other(place, tmp_path):
    train(place, tmp_path / "softmax", steps=2)
    train(place, tmp_path / "sigmoid", steps=2, loss="siglip")
    state = {kind: load_file(tmp_path / kind / "model.safetensors") for kind in ("softmax", "sigmoid")}
    still = {"learning_rate": 1e-12, "steps": 1, "warmup_steps": 1, "weight_decay": 0.0}

    def begun(output: str, **changes: object) -> tuple[dict, dict]:
        train(place, tmp_path / output, **still, **changes)
        return lines_of(tmp_path / output)[0], load_file(tmp_path / output / "model.safetensors")

    def weights(kind: str) -> dict[str, str]:
        return {"weights": str(tmp_path / kind / "model.safetensors")}

    line, found = begun("a", loss="siglip", **weights("softmax"))
    # a softmax's scale would put every sigmoid at its end
    assert (line["logit_scale"], line["logit_bias"]) == pytest.approx((10.0, -10.0))
    torch.testing.assert_close(found["visual.proj"], state["softmax"]["visual.proj"])
    for name in ("siglip", "auto"):
        # its own model.json says that there is a bias
        model = {} if name == "siglip" else {"model": str(tmp_path / "sigmoid" / "model.json")}
        line, found = begun(name, loss=name, **model, **weights("sigmoid"))
        assert line["logit_bias"] == pytest.approx(state["sigmoid"]["logit_bias"].item())
        assert line["logit_scale"] == pytest.approx(state["sigmoid"]["logit_scale"].exp().item())
    for name, model in (("b", {}), ("c", {"model": str(tmp_path / "sigmoid" / "model.json")})):
        line, found = begun(name, loss="clip", **model, **weights("sigmoid"))
        assert "logit_bias" not in line
        assert "logit_bias" not in found
        assert line["logit_scale"] == pytest.approx(state["sigmoid"]["logit_scale"].exp().item())
        assert sigmoid_of(open_model(tmp_path / name, device="cpu")) is None
