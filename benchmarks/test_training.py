"""What the training engine takes over a bare loop that computes the same, and what gradients by parts take.

pytest benchmarks/test_training.py
"""

from __future__ import annotations

import copy
import json

import torch
from harness import DEVICE, by_scale, measure

import clipfast
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row
from clipfast.train.config import TrainConfig
from clipfast.train.demo import SMALL
from clipfast.train.engine import StepRecord, train_on
from clipfast.train.optimizer import make_optimizer
from clipfast.train.records import step_values
from clipfast.train.trainer import Trainer

BATCH = by_scale(smoke=8, short=64, full=64, gpu=1024)
STEPS = 3
RATE = 1e-9  # so small that every round computes the same


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40_000, (BATCH, 12), generator=generator)
    tokens[torch.arange(BATCH), torch.randint(6, 12, (BATCH,), generator=generator)] = 49407
    return torch.randn(BATCH, 3, 64, 64, generator=generator).to(DEVICE), tokens.to(DEVICE)


class Bare:
    """The shortest loop that trains the same: no log, no records, no schedule."""

    def __init__(self, model: clipfast.CLIP) -> None:
        self.model, self.optimizer = model.train(), make_optimizer(model, RATE, 0.1)
        self.loss = clipfast.ContrastiveLoss()

    def run(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        for _ in range(STEPS):
            image, text, scale = self.model(images, tokens)
            loss = self.loss(image, text, scale)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.clamp_logit_scale()
            value = loss.item()
        return torch.tensor(value)


class Engine:
    """``clipfast train``'s loop with its log."""

    def __init__(self, model: clipfast.CLIP, log: object, **options: object) -> None:
        options = {"schedule": "constant", "warmup_steps": 0, "learning_rate": RATE} | options
        self.options, self.log = options, log
        self.trainer = Trainer(model, TrainConfig(10**9, **options))

    def run(self, images: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        def write(record: StepRecord) -> None:
            self.log.write(json.dumps(step_values(record)) + "\n")

        steps = self.trainer.step + STEPS
        self.trainer.config = TrainConfig(steps, **self.options)
        return torch.tensor(train_on(self.trainer, [(images, tokens, ())] * STEPS, [write]).history[-1].loss)


def oracle(model: clipfast.CLIP, images: torch.Tensor, tokens: torch.Tensor) -> Oracle:
    """The first step's loss, which so small a learning rate leaves the last one's."""
    with torch.no_grad(), clipfast.backend("reference"), clipfast.exact_shortcuts(False):
        exact = clipfast.ContrastiveLoss()(*copy.deepcopy(model).double()(images.double(), tokens))
    return Oracle([exact], "bare loop")


def row(name: str) -> Row:
    return Row(
        op="training",
        name=f"training, the demo's model, {BATCH} pairs, {STEPS} steps, {name}",
        label=name,
        direction="step",
        dtype="float32",
        unit="pairs",
        items=BATCH * STEPS,
    )


def test_engine_over_a_bare_loop(benchmark, tmp_path):
    """The bare loop is there twice: what its two times differ by is noise."""
    model = clipfast.create_model(SMALL, device=DEVICE)
    inputs = batch()
    with (tmp_path / "log.jsonl").open("w", buffering=1) as log:
        sides = {
            "clipfast": Engine(copy.deepcopy(model), log).run,
            "bare loop": Bare(copy.deepcopy(model)).run,
            "bare loop again": Bare(copy.deepcopy(model)).run,
        }
        measure(benchmark, row("the engine and a bare loop"), sides, [inputs], oracle=oracle(model, *inputs))


def test_gradients_by_parts(benchmark, tmp_path):
    """Four parts compute every forward pass twice, and hold a fourth of the activations."""
    model = clipfast.create_model(SMALL, device=DEVICE)
    inputs = batch()
    with (tmp_path / "log.jsonl").open("w", buffering=1) as log:
        sides = {
            "clipfast": Engine(copy.deepcopy(model), log).run,
            "clipfast, four parts": Engine(copy.deepcopy(model), log, micro_batch_size=BATCH // 4).run,
            "bare loop": Bare(copy.deepcopy(model)).run,
        }
        measure(benchmark, row("gradients by parts"), sides, [inputs], oracle=oracle(model, *inputs))
