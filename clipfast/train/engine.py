"""The training loop: batches in, a trained model and a log out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clipfast.models.clip import CLIP
from clipfast.modules.loss import ContrastiveLoss
from clipfast.train.interrupt import stop_on_interrupt
from clipfast.train.optimizer import make_optimizer, warmup_cosine

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        steps: Optimizer steps.
        learning_rate: At the end of the warm-up; a cosine takes it to 0 from there.
        warmup_steps: Steps of linear warm-up; no more than ``steps`` are taken.
        weight_decay: Of matrices; biases, norms, scalars and position embeddings do not decay.
        max_grad_norm: Gradients are scaled down to this norm; None leaves them.
        precision: ``"fp32"``, or ``"bf16"`` for autocast around the towers. The loss is computed in float32.
    """

    steps: int
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    weight_decay: float = 0.1
    max_grad_norm: float | None = 1.0
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: got {self.steps}, expected at least 1")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate: got {self.learning_rate}, expected a positive number")
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f"precision: got {self.precision!r}, expected 'fp32' or 'bf16'")


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step, as the log has it.

    Attributes:
        step: Counted from 1.
        loss: Of the step's batch, before the update.
        logit_scale: The factor between cosines and logits (not its logarithm), before the update.
        learning_rate: Of this step.
        samples_per_second: Pairs over this step's time, data included.
        seconds: Since training began.
    """

    step: int
    loss: float
    logit_scale: float
    learning_rate: float
    samples_per_second: float
    seconds: float


@dataclass
class TrainResult:
    """What became of a run: its records, and whether Ctrl-C ended it early."""

    history: list[StepRecord] = field(default_factory=list)
    interrupted: bool = False


def train(
    model: CLIP,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: TrainConfig,
    *,
    log_path: Path | None = None,
    on_step: Callable[[StepRecord], None] | None = None,
) -> TrainResult:
    """Train ``model`` in place with the contrastive loss.

    The first Ctrl-C ends training after the step in progress, so that what was learned can be evaluated and saved;
    the second one is an ordinary KeyboardInterrupt.

    Args:
        model: On its device, in float32.
        batches: Of ``(images [B, 3, H, W], tokens [B, L])``, with ``config.steps`` batches or more.
        config: How to train.
        log_path: A file that gets one JSON line for each step, at once; an old one is overwritten.
        on_step: Called with each step's record.

    Raises:
        ValueError: ``batches`` ended before ``config.steps``.
        FloatingPointError: The loss is not finite. The weights are those before that batch.
    """
    optimizer = make_optimizer(model, config.learning_rate, config.weight_decay)
    result = TrainResult()
    model.train()
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
    log_file = nullcontext() if log_path is None else log_path.open("w", encoding="utf-8", buffering=1)

    started = before = time.perf_counter()
    supply = iter(batches)
    with log_file as log, stop_on_interrupt() as stop:
        for step in range(config.steps):
            batch = next(supply, None)
            if batch is None:
                raise ValueError(f"batches: ended after {step}, expected {config.steps}, one for each step")
            learning_rate = config.learning_rate * warmup_cosine(step, config.steps, config.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            loss, logit_scale = _compute_gradients(model, *batch, config.precision)
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at step {step + 1} (logit scale {logit_scale:.4g}, learning rate "
                    f"{learning_rate:.3g}), expected a finite number: look for NaN in the batch or the weights, or "
                    f"train with a lower learning rate or a longer warm-up"
                )
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            model.clamp_logit_scale()

            now = time.perf_counter()
            speed = len(batch[0]) / (now - before)
            before = now
            record = StepRecord(step + 1, loss, logit_scale, learning_rate, speed, now - started)
            result.history.append(record)
            if log is not None:
                log.write(json.dumps(asdict(record)) + "\n")
            if on_step is not None:
                on_step(record)
            if stop.requested:
                result.interrupted = True
                break
    return result


def _compute_gradients(model: CLIP, images: Tensor, tokens: Tensor, precision: Precision) -> tuple[float, float]:
    """Add the batch's gradients to the parameters'; return its loss and the logit scale."""
    device = model.logit_scale.device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        image_features, text_features, logit_scale = model(images.to(device), tokens.to(device))
    # logits need more than bfloat16's eight bits
    dtype = torch.promote_types(image_features.dtype, torch.float32)
    loss = ContrastiveLoss()(image_features.to(dtype), text_features.to(dtype), logit_scale)
    loss.backward()
    # one wait for the device, after all its work is queued
    loss_value, scale_value = torch.stack([loss.detach(), logit_scale.detach()]).tolist()
    return loss_value, scale_value
