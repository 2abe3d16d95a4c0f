"""Training with a teacher: its logits are learned from, and it stays as it is."""

from __future__ import annotations

import io
import json

import pytest
import torch
import torch.nn.functional as F
from contrastive_recipes import plain_distillation
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

import clipfast
from clipfast.train.config import TrainConfig, make_run_config
from clipfast.train.gradients import StepSeeds, compute_gradients
from clipfast.train.run import run_training
from clipfast.train.towers import Towers
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}
ALONE = Workplace(torch.device("cpu"))


def models(dtype: torch.dtype = torch.float32) -> tuple[clipfast.CLIP, clipfast.CLIP]:
    torch.manual_seed(0)
    wider = TINY | {"embed_dim": 24}
    return clipfast.create_model(TINY, dtype=dtype), clipfast.create_model(wider, dtype=dtype).eval()


def pairs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 38, (10, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(10, 3, 16, 16, generator=generator, dtype=dtype), tokens


@pytest.mark.parametrize("size", [None, 3])
def test_gradients_are_those_of_open_clips_formulas(size):
    model, teacher = models(torch.float64)
    images, tokens = pairs(torch.float64)
    towers = [Towers(m, "fp32", ALONE) for m in (model, teacher)]
    found = compute_gradients(
        towers[0], images, tokens, StepSeeds(0, 0, 0), micro_batch_size=size, loss_factor=2.0, teacher=towers[1]
    )
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    features = [
        F.normalize(x, dim=-1) for m in (model, teacher) for x in (m.encode_image(images), m.encode_text(tokens))
    ]
    scales = [m.logit_scale.exp() for m in (model, teacher)]
    taught = [x.detach() for x in (*features[2:], scales[1])]
    expected = sum(plain_distillation(*features[:2], scales[0], *taught))
    (2 * expected).backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-13)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-11, atol=1e-13, msg=name)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_a_teacher_stays_and_is_learned_from(precision):
    model, teacher = models()
    before = {n: p.clone() for n, p in teacher.state_dict().items()}
    config = TrainConfig(20, learning_rate=1e-2, warmup_steps=0, weight_decay=0.5, precision=precision)
    trainer = Trainer(model, config, teacher=teacher)
    losses = [trainer.take_step(*pairs()).loss for _ in range(20)]
    assert losses[-1] < losses[0]
    assert not teacher.training
    assert all(torch.equal(p, before[n]) for n, p in teacher.state_dict().items())
    assert not any("teacher" in name for name in trainer.state())
    with pytest.raises(ValueError, match="label_smoothing: got 0.1 with a teacher, expected 0"):
        Trainer(model, TrainConfig(2, label_smoothing=0.1), teacher=teacher)


def test_a_run_with_a_teacher(tmp_path):
    config = TINY | {"text_cfg": {k: v for k, v in TINY["text_cfg"].items() if k != "vocab_size"}}
    other = config | {"vision_cfg": TINY["vision_cfg"] | {"image_size": 32}}
    for name, values in (("tiny", config), ("wide", config | {"embed_dim": 24}), ("large", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    torch.manual_seed(0)
    save_file(clipfast.create_model(tmp_path / "wide.json").state_dict(), tmp_path / "wide.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"red {i}")
    settings = {
        "data": str(data),
        "model": str(tmp_path / "tiny.json"),
        "steps": 2,
        "batch_size": 4,
        "workers": 0,
        "device": "cpu",
        "tensorboard": False,
        "distill_weights": str(tmp_path / "wide.safetensors"),
    }

    def losses(output: str, **changes: object) -> list[float]:
        run = make_run_config(settings | changes | {"output": str(tmp_path / output)})
        result = run_training(run, console=Console(file=io.StringIO()))
        return [record.loss for record in result.training.history]

    taught = losses("taught", distill_model=str(tmp_path / "wide.json"))
    alone = losses("alone", distill_weights=None)
    assert len(taught) == 2
    assert taught[0] > alone[0] + 1
    with pytest.raises(ValueError, match="distill_model: got image_size 32, expected 16"):
        losses("large", distill_model=str(tmp_path / "large.json"))
    with pytest.raises(ValueError, match="distill_model, distill_weights: got None and .*, expected both or neither"):
        losses("none")
    with pytest.raises(ValueError, match="label_smoothing: got 0.1 with distill_model, expected 0"):
        losses("smoothed", distill_model=str(tmp_path / "wide.json"), label_smoothing=0.1)
