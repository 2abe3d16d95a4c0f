"""What the training engine takes over a bare loop that computes the same, and what gradients by parts take.

CLIPFAST_BENCH_THREADS sets the threads (2 by default), CLIPFAST_BENCH_ROUNDS the rounds (10).
"""

from __future__ import annotations

import copy
import json
import os
import time

import torch
from harness import DEVICE, ON_GPU, report_paired

import clipfast
from clipfast.train.config import TrainConfig
from clipfast.train.demo import SMALL
from clipfast.train.engine import StepRecord, train_on
from clipfast.train.optimizer import make_optimizer
from clipfast.train.records import step_values
from clipfast.train.trainer import Trainer

BATCH = 1024 if ON_GPU else 64
ROUNDS = int(os.environ.get("CLIPFAST_BENCH_ROUNDS", "10"))
STEPS = 3


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 40_000, (BATCH, 12), generator=generator)
    tokens[torch.arange(BATCH), torch.randint(6, 12, (BATCH,), generator=generator)] = 49407
    return torch.randn(BATCH, 3, 64, 64, generator=generator).to(DEVICE), tokens.to(DEVICE)


class Bare:
    """The shortest loop that trains the same: no log, no records, no schedule."""

    def __init__(self, model: clipfast.CLIP) -> None:
        self.model, self.optimizer = model.train(), make_optimizer(model, 1e-4, 0.1)
        self.loss = clipfast.ContrastiveLoss()

    def run(self, images: torch.Tensor, tokens: torch.Tensor) -> float:
        for _ in range(STEPS):
            image, text, scale = self.model(images, tokens)
            loss = self.loss(image, text, scale)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.model.clamp_logit_scale()
            value = loss.item()
        return value


class Engine:
    """``clipfast train``'s loop with its log."""

    def __init__(self, model: clipfast.CLIP, log: object, **options: object) -> None:
        options = {"schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-4} | options
        self.options, self.log = options, log
        self.trainer = Trainer(model, TrainConfig(10**9, **options))

    def run(self, images: torch.Tensor, tokens: torch.Tensor) -> float:
        def write(record: StepRecord) -> None:
            self.log.write(json.dumps(step_values(record)) + "\n")

        steps = self.trainer.step + STEPS
        self.trainer.config = TrainConfig(steps, **self.options)
        return train_on(self.trainer, [(images, tokens, ())] * STEPS, [write]).history[-1].loss


def in_turn(sides: dict[str, Bare | Engine], images: torch.Tensor, tokens: torch.Tensor) -> dict[str, list[float]]:
    """Return wall times of a round each, every side going first as often as the others."""
    first = {name: side.run(images, tokens) for name, side in sides.items()}
    assert max(first.values()) - min(first.values()) < 1e-3, first
    times: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(ROUNDS):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            began = time.perf_counter()
            sides[name].run(images, tokens)
            times[name].append(time.perf_counter() - began)
    return times


def test_engine_over_a_bare_loop(capsys, tmp_path):
    """The bare loop is there twice: what its two times differ by is noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("CLIPFAST_BENCH_THREADS", "2")))
    torch.manual_seed(0)
    model = clipfast.create_model(SMALL, device=DEVICE)
    images, tokens = batch()
    with (tmp_path / "log.jsonl").open("w", buffering=1) as log:
        for sides in (
            {
                "bare loop": Bare(copy.deepcopy(model)),
                "bare loop again": Bare(copy.deepcopy(model)),
                "engine": Engine(copy.deepcopy(model), log),
            },
            {
                "engine, whole batch": Engine(copy.deepcopy(model), log),
                "engine, four parts": Engine(copy.deepcopy(model), log, micro_batch_size=BATCH // 4),
            },
        ):
            times = in_turn(sides, images, tokens)
            title = f"training, the demo's model, {BATCH} pairs, {STEPS} steps"
            report_paired(capsys, title, times, sides, BATCH * STEPS, op="training_engine")
    torch.set_num_threads(threads)
