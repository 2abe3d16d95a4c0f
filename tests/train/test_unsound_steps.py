"""A step whose loss or gradients are not finite changes nothing, although nobody looks at them before it is taken."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import clipfast
from clipfast.train import optimizer
from clipfast.train.config import TrainConfig
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
}
CONFIG = TrainConfig(8, learning_rate=1e-2, warmup_steps=0, ema_decay=0.75)


def tiny_model() -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.create_model(TINY)


def pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 38, (10, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(10, 3, 16, 16, generator=generator), tokens


def whole(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in state.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def spoil_image(trainer: Trainer, images: Tensor, tokens: Tensor) -> None:
    images = torch.where(torch.arange(len(images))[:, None, None, None] == 2, torch.inf, images)
    trainer.take_step(images, tokens)


def spoil_gradient(trainer: Trainer, images: Tensor, tokens: Tensor) -> None:
    """Let the loss be finite, and one element of one gradient not."""
    parameter = trainer.model.visual.proj
    handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([1]), torch.nan))
    try:
        trainer.take_step(images, tokens)
    finally:
        handle.remove()


def check_nothing_is_lost(trainer: Trainer, other: Trainer, spoil: object, message: str) -> None:
    """Compare a trainer that meets bad batches, at its first step too, with one that does not."""
    for step in range(4):
        if step != 1:
            before, numbers = whole(trainer.state()), trainer.numbers()
            with pytest.raises(FloatingPointError, match=rf"{message} at step {step + 1} "):
                spoil(trainer, *pairs(seed=100 + step))
            assert_same(whole(trainer.state()), before)
            assert all(p.grad is None for p in trainer.model.parameters())
            if not trainer.scaler.is_enabled():  # which backs off
                assert trainer.numbers() == numbers
        results = [t.take_step(*pairs(seed=step)) for t in (trainer, other)]
        if not trainer.scaler.is_enabled():
            assert results[0] == results[1]
    if not trainer.scaler.is_enabled():
        assert_same(whole(trainer.state()), whole(other.state()))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16", "fp16"])
@pytest.mark.parametrize("max_grad_norm", [1.0, None])
def test_a_loss_that_is_not_finite(precision: str, max_grad_norm: float | None) -> None:
    config = replace(CONFIG, precision=precision, max_grad_norm=max_grad_norm)
    check_nothing_is_lost(Trainer(tiny_model(), config), Trainer(tiny_model(), config), spoil_image, "the loss is nan")


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_a_gradient_that_is_not_finite(precision: str) -> None:
    config = replace(CONFIG, precision=precision)
    trainers = (Trainer(tiny_model(), config) for _ in range(2))
    check_nothing_is_lost(*trainers, spoil_gradient, "the gradients' norm is nan")


def test_a_temperature_out_of_bounds_stays_as_it_was() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    trainer = Trainer(model, CONFIG)
    with pytest.raises(FloatingPointError):
        spoil_image(trainer, *pairs())
    assert model.logit_scale.item() == 9.0
    trainer.take_step(*pairs())
    assert model.logit_scale.item() == pytest.approx(math.log(100))


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Workplace]:
    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    yield Workplace(torch.device("cpu"), group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16"])
def test_shards(one_rank: Workplace, precision: str) -> None:
    config = replace(CONFIG, strategy="fsdp", precision=precision)
    trainers = (Trainer(tiny_model(), config, one_rank) for _ in range(2))
    check_nothing_is_lost(*trainers, spoil_image, "the loss is nan")


# ----------------------------------------------------------------------------------------------------------------------
# many tensors at once: the bits of one after the other


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 5), (7,), (), (2, 3, 4), (33, 17)]
    return [(10 * torch.randn(shape, generator=generator)).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_averages_move_as_lerp_does(dtype: torch.dtype) -> None:
    for share in (1e-4, 0.25, 0.5, 0.75, 1.0):
        averages, weights = tensors(dtype, 1), tensors(dtype, 2)
        expected = [a.clone().lerp_(w, share) for a, w in zip(averages, weights, strict=True)]
        optimizer.move_towards(averages, weights, share)
        assert all(map(torch.equal, averages, expected))
    optimizer.move_towards([], [], 0.5)


@pytest.mark.parametrize("norm", [0.1, 1e6, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradients_are_scaled_as_one_by_one(dtype: torch.dtype, norm: float | None) -> None:
    gradients = tensors(dtype, 3)
    found = optimizer.gradient_norm(gradients)
    factor = torch.ones(()) if norm is None else (norm / (found + 1e-6)).clamp(max=1.0)
    expected = [g.clone().mul_(factor) for g in gradients]
    assert torch.equal(optimizer.clip_gradients(gradients, norm), found)
    assert all(map(torch.equal, gradients, expected))


def test_copies_between_dtypes() -> None:
    sources = tensors(torch.float32, 4)
    targets = [torch.empty_like(s, dtype=torch.bfloat16) for s in sources]
    optimizer.copy_each(targets, sources)
    assert all(torch.equal(t, s.bfloat16()) for t, s in zip(targets, sources, strict=True))
    optimizer.copy_each([], [])


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_is_sound_is_the_optimizers_own(scaled: bool) -> None:
    models = [tiny_model() for _ in range(2)]
    optimizers = [optimizer.make_optimizer(model, 1e-2, 0.1) for model in models]
    scalers = [torch.amp.GradScaler("cpu", enabled=scaled) for _ in range(2)]
    for step in range(3):
        for model, one, scaler, guarded in zip(models, optimizers, scalers, (True, False), strict=True):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            sound = torch.tensor(True)
            if guarded and scaled:
                optimizer.mark_unsound([p.grad for p in model.parameters()], sound)
            scaler.scale(torch.ones(()))
            if scaled:
                scaler.unscale_(one)
            optimizer.step_if(one, sound, scaler) if guarded else scaler.step(one)
            scaler.update()
    states = [copy.deepcopy([*one.state.values()]) for one in optimizers]
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)
    for first, second in zip(*states, strict=True):
        assert_same(first, second)
