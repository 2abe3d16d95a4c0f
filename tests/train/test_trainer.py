"""One step and ten: gradients by parts, precisions, moving averages, and going on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import clipfast
from clipfast.train.config import TrainConfig
from clipfast.train.gradients import StepSeeds, compute_gradients
from clipfast.train.towers import Towers
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
}
ALONE = Workplace(torch.device("cpu"))


def tiny_model(**vision: object) -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.create_model(TINY | {"vision_cfg": TINY["vision_cfg"] | vision})


def pairs(count: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 38, (count, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(count, 3, 16, 16, generator=generator), tokens


def gradients(model: clipfast.CLIP, size: int | None, seed: int = 0) -> tuple[float, dict[str, torch.Tensor]]:
    images, tokens = pairs()
    images = images.to(model.logit_scale.dtype)
    model.zero_grad()
    shared = Towers(model.train(), "fp32", ALONE)
    found = compute_gradients(shared, images, tokens, StepSeeds(seed, 3, 0), micro_batch_size=size)
    return found.loss.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_gradients_by_parts_are_those_of_the_whole_batch(size):
    model = tiny_model().double()
    loss, whole = gradients(model, None)
    by_parts, parts = gradients(model, size)
    assert by_parts == pytest.approx(loss, rel=1e-13)
    for name, expected in whole.items():
        torch.testing.assert_close(parts[name], expected, rtol=1e-11, atol=1e-13, msg=name)
    assert whole["logit_scale"].abs() > 1e-4


def test_random_numbers_are_the_same_in_both_passes():
    """With patch dropout, each pass must leave out the same patches: checked against one pass of the same parts."""
    model = tiny_model(patch_dropout=0.5).double().train()
    images, tokens = pairs()
    images = images.double()
    loss, found = gradients(model, 4)
    model.zero_grad()
    seeds = StepSeeds(0, 3, 0)
    towers = Towers(model, "fp32", ALONE)
    parts = [
        towers(i, t, seeds.of_part(n)) for n, (i, t) in enumerate(zip(images.split(4), tokens.split(4), strict=True))
    ]
    logits = parts[0].logit_scale * torch.cat([p.image for p in parts]) @ torch.cat([p.text for p in parts]).T
    labels = torch.arange(len(images))
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-12, msg=name)
    # and it is random: another step leaves out others
    assert gradients(model, 4, seed=1)[0] != loss


def test_batch_statistics_cannot_be_had_by_parts():
    config = TINY | {"vision_cfg": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}}
    with pytest.raises(ValueError, match="micro_batch_size: got a model with BatchNorm"):
        Trainer(clipfast.create_model(config), TrainConfig(1, micro_batch_size=2))


def losses(config: TrainConfig, model: clipfast.CLIP | None = None, steps: int = 30) -> list[float]:
    trainer = Trainer(model or tiny_model(), config)
    return [trainer.take_step(*pairs()).loss for _ in range(steps)]


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
def test_every_precision_learns_as_float32_does(precision):
    exact = losses(TrainConfig(30, learning_rate=3e-3, warmup_steps=3))
    found = losses(TrainConfig(30, learning_rate=3e-3, warmup_steps=3, precision=precision))
    assert exact[-1] < 0.2 * exact[0]
    assert found[0] == pytest.approx(exact[0], rel=0.02)
    assert found[0] != exact[0]
    assert found[-1] < 0.3 * exact[0]


def test_pure_bf16_computes_in_bfloat16_and_learns_in_float32():
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, TrainConfig(5, learning_rate=1e-5, warmup_steps=0, precision="pure_bf16"))
    for _ in range(5):
        trainer.take_step(*pairs())
    proj = model.visual.transformer.resblocks[0].mlp.c_proj.weight
    name = "visual.transformer.resblocks.0.mlp.c_proj.weight"
    assert proj.dtype == torch.bfloat16
    assert model.logit_scale.dtype == torch.float32
    # steps this small are lost in bfloat16's eight bits, and not in the copy's
    moved = (trainer.weights[name] - before[name]).abs()
    assert moved.median() > 1e-6
    assert torch.equal(proj, trainer.weights[name].bfloat16())
    assert (proj.float() - before[name].bfloat16().float()).abs().eq(0).float().mean() > 0.5


def test_fp16_halves_its_scale_and_skips_the_step_where_gradients_overflow():
    trainer = Trainer(tiny_model(), TrainConfig(5, precision="fp16"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {n: w.detach().clone() for n, w in trainer.weights.items()}
    trainer.take_step(*pairs())
    assert trainer.scaler.get_scale() == 2.0**119
    assert all(torch.equal(w, before[n]) for n, w in trainer.weights.items())


def test_moving_averages():
    trainer = Trainer(tiny_model(), TrainConfig(4, ema_decay=0.75))
    expected = {n: w.detach().double() for n, w in trainer.weights.items()}
    for _ in range(4):
        trainer.take_step(*pairs())
        expected = {n: 0.75 * e + 0.25 * trainer.weights[n].detach().double() for n, e in expected.items()}
    for name, average in trainer.ema.items():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-6, atol=1e-7)


def test_schedules():
    for schedule, last in (
        ("constant", 1e-3),
        ("cosine", 0.5e-3 * (1 + torch.cos(torch.tensor(torch.pi * 2 / 3)).item())),
    ):
        trainer = Trainer(tiny_model(), TrainConfig(5, schedule=schedule, warmup_steps=2))
        rates = [trainer.take_step(*pairs()).learning_rate for _ in range(5)]
        assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
        assert rates[-1] == pytest.approx(last)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same():
    exact = losses(TrainConfig(30, learning_rate=1e-3), steps=3)
    compiled = losses(TrainConfig(30, learning_rate=1e-3, compile="reduce-overhead"), steps=3)
    assert compiled == pytest.approx(exact, rel=1e-5)


MODES = {
    "no": (),
    "default": ("default", "default"),
    "reduce-overhead": ("reduce-overhead", "default"),
    "max-autotune": ("max-autotune", "max-autotune-no-cudagraphs"),
    "max-autotune-no-cudagraphs": ("max-autotune-no-cudagraphs",) * 2,
}


@pytest.mark.parametrize(("mode", "expected"), MODES.items(), ids=MODES)
def test_the_mode_of_every_tower(mode, expected, monkeypatch):
    """Packed captions get no CUDA graph, and each step with graphs says when it begins."""
    found, marks = [], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: found.append(options))
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(trainer.step))
    trainer = Trainer(tiny_model(), TrainConfig(3, compile=mode))
    layers = TINY["vision_cfg"]["layers"]
    assert found == [{"mode": m} for m in expected for _ in range(layers)]
    for _ in range(2):
        trainer.take_step(*pairs())
    assert marks == ([0, 1] if mode in ("reduce-overhead", "max-autotune") else [])


def test_checkpointed_blocks_compute_the_same():
    exact = losses(TrainConfig(30, learning_rate=1e-3), steps=3)
    assert losses(TrainConfig(30, learning_rate=1e-3, grad_checkpointing=True), steps=3) == pytest.approx(
        exact, rel=1e-6
    )


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16", "fp16"])
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_it_goes_on_from_its_state_bitwise(precision, ema_decay):
    config = TrainConfig(6, precision=precision, ema_decay=ema_decay, micro_batch_size=4)
    straight, first, second = (Trainer(tiny_model(patch_dropout=0.5), config) for _ in range(3))
    for step in range(6):
        straight.take_step(*pairs(seed=step))
    for step in range(3):
        first.take_step(*pairs(seed=step))
    kept, numbers = copy.deepcopy(first.state()), first.numbers()
    target = second.state()
    assert kept.keys() == target.keys()
    for name, value in kept.items():
        target[name].copy_(value)
    second.loaded(numbers)
    assert second.step == 3
    for step in range(3, 6):
        second.take_step(*pairs(seed=step))
    for name, value in straight.state().items():
        assert torch.equal(second.state()[name], value), name
    assert second.numbers() == straight.numbers()


def test_frozen_parameters_stay():
    model = tiny_model()
    model.visual.conv1.weight.requires_grad = False
    before = model.visual.conv1.weight.clone()
    trainer = Trainer(model, TrainConfig(2))
    trainer.take_step(*pairs())
    assert torch.equal(model.visual.conv1.weight, before)
    assert "frozen.visual.conv1.weight" in trainer.state()
