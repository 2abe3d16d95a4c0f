"""The training loop: batches in, a trained model and a log out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from clipfast.models.clip import CLIP
from clipfast.modules.naflex import NaFlexBatch
from clipfast.train.config import TrainConfig
from clipfast.train.interrupt import stop_on_interrupt
from clipfast.train.trainer import Trainer


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as the log has it.

    Attributes:
        step: Counted from 1.
        loss: Of the step's batch, joined over ranks, before the update.
        logit_scale: The factor between cosines and logits (not its logarithm), before the update.
        learning_rate: Of this step.
        grad_norm: The norm of all gradients, before clipping.
        samples_per_second: Pairs of all ranks over this step's time, data included.
        data_wait: The share of this step's time that was spent waiting for its batch, on this rank.
        skipped: Pairs that could not be used so far, on this rank.
        memory: The most bytes that a GPU's tensors took so far, on this rank; 0 on a CPU.
        seconds: Since training began, or went on.
        logit_bias: What is added to logits, before the update; None for a model without one.
    """

    step: int
    loss: float
    logit_scale: float
    learning_rate: float
    grad_norm: float
    samples_per_second: float
    data_wait: float
    skipped: int
    memory: int
    seconds: float
    logit_bias: float | None = None

    def to_dict(self) -> dict[str, float | int]:
        """Return what there is, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass
class TrainResult:
    """What became of a run: its records, and whether Ctrl-C or a signal ended it early."""

    history: list[StepRecord] = field(default_factory=list)
    interrupted: bool = False


def train(
    model: CLIP,
    batches: Iterable[tuple[Tensor | NaFlexBatch, Tensor]],
    config: TrainConfig,
    *,
    log_path: Path | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place, in one process.

    The first Ctrl-C ends training after the step in progress, so that what was learned can be evaluated and saved;
    the second one is an ordinary KeyboardInterrupt.

    Args:
        model: On its device, in float32.
        batches: Of ``(images [B, 3, H, W] or packed patches, tokens [B, L])``, with ``config.steps`` batches or more.
        config: How to train.
        log_path: A file that gets one JSON line for each step, at once; an old one is overwritten.
        on_step: Called with each step's record.

    Raises:
        ValueError: ``batches`` ended before ``config.steps``.
        FloatingPointError: The loss is not finite. The weights are those before that batch.
    """
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
    log_file = nullcontext() if log_path is None else log_path.open("w", encoding="utf-8", buffering=1)
    with log_file as log:
        listeners = [] if log is None else [lambda record: log.write(json.dumps(record.to_dict()) + "\n")]
        return train_on(Trainer(model, config), batches, [*listeners, *([on_step] if on_step else [])])


def train_on(
    trainer: Trainer,
    batches: Iterable[tuple[Tensor | NaFlexBatch, Tensor]],
    listeners: Sequence[Callable[[StepRecord], object]] = (),
) -> TrainResult:
    """Go on training from where a trainer stands, up to its ``config.steps``.

    Ctrl-C, and the signal by which a cluster's scheduler announces the end, on any rank end training on all of them
    after the step in progress: ranks agree before each step, when they have its batch or wait for it in vain. Batches
    that are to be waited for and left at once are :func:`clipfast.data.batches.training_batches` with ``stop``.

    Args:
        trainer: The model and its optimizer.
        batches: This rank's, of the steps from ``trainer.step`` on; what a third element names was skipped.
        listeners: Called with each step's record, on every rank.

    Raises:
        ValueError: ``batches`` ended too early.
        FloatingPointError: The loss is not finite.
    """
    result, workplace = TrainResult(), trainer.workplace
    steps, first, skipped = trainer.config.steps, trainer.step, 0
    started = before = time.perf_counter()
    supply = iter(batches)
    with stop_on_interrupt() as stop:
        while trainer.step < steps:
            batch = None if stop.requested else next(supply, None)
            if workplace.any(stop.requested):
                result.interrupted = True
                break
            if batch is None:
                raise ValueError(
                    f"batches: ended after {trainer.step - first}, expected {steps - first}, one for each step"
                )
            waited = time.perf_counter() - before
            images, tokens, *rest = batch
            skipped += len(rest[0]) if rest else 0
            taken = trainer.take_step(images, tokens)
            now = time.perf_counter()
            record = StepRecord(
                step=trainer.step,
                **asdict(taken),
                samples_per_second=len(images) * workplace.world_size / (now - before),
                data_wait=waited / (now - before),
                skipped=skipped,
                memory=torch.cuda.max_memory_allocated(workplace.device) if workplace.device.type == "cuda" else 0,
                seconds=now - started,
            )
            result.history.append(record)
            for listener in listeners:
                listener(record)
            # what listeners do, such as saving, is no step's time
            before = time.perf_counter()
    return result
