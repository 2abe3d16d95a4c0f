"""A model in training: its weights, its optimizer, and one step after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipfast.models.clip import CLIP
from clipfast.models.warm_up import warm_up
from clipfast.train.config import Compile, TrainConfig
from clipfast.train.gradients import StepSeeds, compute_gradients
from clipfast.train.limits import GRAPH_MODES
from clipfast.train.optimizer import (
    clip_gradients,
    copy_each,
    learning_rate_share,
    make_optimizer,
    mark_unsound,
    move_towards,
    step_if,
)
from clipfast.train.plan import share_plan
from clipfast.train.token_gradient import TokenGradient
from clipfast.train.towers import Towers, autocast_of, halve, share_towers
from clipfast.train.workplace import Workplace


@dataclass(frozen=True)
class StepResult:
    """What a step came to.

    Attributes:
        loss: Of the step's batch, before the update.
        logit_scale: The factor between cosines and logits (not its logarithm), before the update.
        learning_rate: Of this step.
        grad_norm: The norm of all gradients, before clipping.
    """

    loss: float
    logit_scale: float
    learning_rate: float
    grad_norm: float


class Trainer:
    """A model in training.

    Args:
        model: In float32 (or float64); it is moved to the workplace's device, and trained in place.
        config: How.
        workplace: Where, and with whom; the model's own device by default.
        equal_batches: The promise that ranks always hold equally many pairs, which spares an exchange a step.
        teacher: Another model, which the model learns from too; it stays as it is, in ``eval()``.

    Attributes:
        step: Steps taken.
        weights: The trainable weights in full precision, by name: the model's parameters, or copies that the optimizer
            works on.
        frozen: The weights that do not learn, in full precision, by name.
        ema: The moving averages of the weights, by name; empty without ``ema_decay``.
        buffers: What the model keeps beside its parameters (BatchNorm's statistics), by name.
        plan: The hash of what chooses kernels, the same on all ranks (:func:`clipfast.train.plan.share_plan`).

    Raises:
        ValueError: ``micro_batch_size`` for a model with BatchNorm, whose statistics depend on the batch; groups of a
            ResNet to unlock, which is frozen as a whole; or ``label_smoothing`` with a teacher.
    """

    def __init__(
        self,
        model: CLIP,
        config: TrainConfig,
        workplace: Workplace | None = None,
        *,
        equal_batches: bool = False,
        teacher: CLIP | None = None,
    ) -> None:
        self.workplace = workplace or Workplace(model.logit_scale.device)
        self.config = config
        self.equal_batches = equal_batches
        self.step = 0
        if teacher is not None and config.label_smoothing:
            raise ValueError(f"label_smoothing: got {config.label_smoothing} with a teacher, expected 0")
        _lock(model, config)
        if config.micro_batch_size is not None and any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()
        ):
            raise ValueError(
                "micro_batch_size: got a model with BatchNorm, expected None: its statistics are those of a whole batch"
            )
        self.model = model.to(self.workplace.device).train()
        if config.grad_checkpointing:
            model.set_grad_checkpointing()
        copies = config.precision == "pure_bf16" and not (self.workplace.group and config.strategy == "fsdp")
        whole = {n: p.detach() for n, p in model.named_parameters() if copies and p.dim()}
        masters = {n: p.clone() for n, p in whole.items() if model.get_parameter(n).requires_grad}
        # what is frozen is no coarser for it when the model is written; beside the model, to take no room on its device
        frozen = {n: p.to("cpu", copy=True) for n, p in whole.items() if n not in masters}
        if copies:
            halve(model)
        # before anything is traced, shared or captured
        self.plan = share_plan(self.workplace)
        if self.workplace.device.type == "cuda":
            with autocast_of(config.precision, self.workplace.device):
                warm_up(model, training=True)
            # kernels have been checked
            self.plan = share_plan(self.workplace)
        _compile_blocks(model, config.compile)
        self.teacher = None
        if teacher is not None:
            teacher = teacher.to(self.workplace.device).eval().requires_grad_(False)
            # its weights stay in their own precision
            precision = "bf16" if config.precision == "pure_bf16" else config.precision
            self.teacher = Towers(teacher, precision, Workplace(self.workplace.device))
        self.shared = share_towers(Towers(model, config.precision, self.workplace), config.strategy)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.weights: dict[str, Tensor] = {n: masters.get(n, p) for n, p in self._parameters.items()}
        others = ((n, p) for n, p in model.named_parameters() if not p.requires_grad)
        self.frozen: dict[str, Tensor] = {n: frozen.get(n, p) for n, p in others}
        self.optimizer = make_optimizer(model, config.learning_rate, config.weight_decay, self.weights)
        self.ema = {n: w.detach().clone() for n, w in self.weights.items()} if config.ema_decay else {}
        self.buffers = dict(model.named_buffers())
        # DDP and FSDP2 have memory of their own for gradients
        alone = self.workplace.group is None
        self._token_gradient = TokenGradient(model.token_embedding if alone else nn.Identity())
        self.scaler = torch.amp.GradScaler(self.workplace.device.type, enabled=config.precision == "fp16")

    def take_step(self, images: Tensor, tokens: Tensor) -> StepResult:
        """Train on one batch: this rank's ``[b, 3, H, W]`` and ``[b, L]``.

        Raises:
            FloatingPointError: The loss is not finite, or without fp16's scale the norm of the gradients. The weights,
                moments and averages are those before this batch.
        """
        config, device = self.config, self.workplace.device
        rate = config.learning_rate * learning_rate_share(config.schedule, self.step, config.steps, config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if config.compile in GRAPH_MODES:
            # what the last step's graphs gave is not looked at any more: this step may write over it
            torch.compiler.cudagraph_mark_step_begin()
        # DDP and FSDP2 bring inputs to the card; otherwise captions in host memory have lengths that nothing waits for
        tokens = tokens if self.workplace.group is None else tokens.to(device, non_blocking=True)
        with self._token_gradient.kept():
            found = compute_gradients(
                self.shared,
                images.to(device, non_blocking=True),
                tokens,
                StepSeeds(config.seed, self.step, self.workplace.rank),
                micro_batch_size=config.micro_batch_size,
                loss_factor=self.scaler.scale(torch.ones((), device=device)) if self.scaler.is_enabled() else 1.0,
                equal_batches=self.equal_batches,
                label_smoothing=config.label_smoothing,
                teacher=self.teacher,
            )
        self._average_scalars()
        self._hand_gradients_over()
        gradients = [w.grad for w in self.weights.values() if w.grad is not None]
        sound = found.loss.isfinite()
        if self.scaler.is_enabled():
            mark_unsound(gradients, sound)
            self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(gradients, config.max_grad_norm)
        if not self.scaler.is_enabled():
            # fp16's scaler expects some that are not finite, and skips their steps
            sound = sound & norm.isfinite()
        step_if(self.optimizer, sound, self.scaler)
        # the one wait for the device, after all its work is queued
        loss, scale, norm = torch.stack([x.to(device, torch.float64) for x in (*found, norm)]).tolist()
        self.model.zero_grad()
        for weight in self._copies.values():
            weight.grad = None
        self.scaler.update()
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.scaler.is_enabled()):
            what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradients' norm is {norm}"
            raise FloatingPointError(
                f"{what} at step {self.step + 1} (logit scale {scale:.4g}, learning rate {rate:.3g}), expected a "
                f"finite number: look for NaN in the batch or the weights, or train with a lower learning rate or a "
                f"longer warm-up"
            )
        self._hand_weights_back()
        self.model.clamp_logit_scale()
        self._update_ema()
        self.step += 1
        return StepResult(loss, scale, rate, norm)

    @property
    def _copies(self) -> Mapping[str, Tensor]:
        return {n: w for n, w in self.weights.items() if w is not self._parameters[n]}

    def _average_scalars(self) -> None:
        """Do for the scalars what FSDP2 does for all others; DDP has done it."""
        if self.workplace.group is None or self.config.strategy != "fsdp":
            return
        for parameter in self._parameters.values():
            if not isinstance(parameter, DTensor) and parameter.grad is not None:
                dist.all_reduce(parameter.grad, group=self.workplace.group)
                parameter.grad /= self.workplace.world_size

    @torch.no_grad()
    def _hand_gradients_over(self) -> None:
        handed: list[Tensor] = []
        for name, weight in self._copies.items():
            gradient = self._parameters[name].grad
            weight.grad = None if gradient is None else torch.empty_like(weight)
            handed += [] if gradient is None else [gradient]
        copy_each([w.grad for w in self._copies.values() if w.grad is not None], handed)

    @torch.no_grad()
    def _hand_weights_back(self) -> None:
        copies = self._copies
        copy_each([self._parameters[name] for name in copies], list(copies.values()))

    @torch.no_grad()
    def _update_ema(self) -> None:
        weights = [self.weights[name].detach() for name in self.ema]
        move_towards(list(self.ema.values()), weights, 1 - self.config.ema_decay)

    # --- state --------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Return everything that training goes on from, as tensors by name; numbers are in :meth:`numbers`.

        The tensors are the live ones: what is copied into them is loaded.
        """
        state = {f"weights.{n}": w.detach() for n, w in self.weights.items()}
        state |= {f"frozen.{n}": p.detach() for n, p in self.frozen.items()}
        state |= {f"buffers.{n}": b for n, b in self.buffers.items()}
        state |= {f"ema.{n}": a for n, a in self.ema.items()}
        for name, weight in self.weights.items():
            for key, value in self._moments(weight).items():
                state[f"optimizer.{key}.{name}"] = value
        return state

    def numbers(self) -> dict[str, float | int]:
        """Return what belongs to :meth:`state` and is no tensor."""
        scaler = self.scaler.state_dict() if self.scaler.is_enabled() else {}
        return {"step": self.step} | {f"scaler.{k}": v for k, v in scaler.items()}

    def loaded(self, numbers: Mapping[str, float | int]) -> None:
        """Go on from what was copied into the tensors of :meth:`state`, and from these :meth:`numbers`."""
        self.step = int(numbers["step"])
        scaler = {k.removeprefix("scaler."): v for k, v in numbers.items() if k.startswith("scaler.")}
        if scaler and self.scaler.is_enabled():
            self.scaler.load_state_dict(scaler)
        self._hand_weights_back()
        with torch.no_grad():
            for name, weight in self.frozen.items():
                parameter = self.model.get_parameter(name)
                if parameter is not weight:
                    parameter.copy_(weight)

    def _moments(self, weight: Tensor) -> dict[str, Tensor]:
        """Return AdamW's state of one weight, as it is before the first step where there is none yet."""
        state = self.optimizer.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            state["exp_avg"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state


def _compile_blocks(model: CLIP, mode: Compile) -> None:
    if mode == "no":
        return
    # a graph is for one shape, and the packed captions of every batch are of another, as pictures of any aspect are
    without = GRAPH_MODES.get(mode, mode)
    of_images = without if getattr(model.visual, "naflex", False) else mode
    for tower, of_tower in ((model.visual, of_images), (model, without)):
        for block in getattr(getattr(tower, "transformer", None), "resblocks", ()):
            block.compile(mode=of_tower)


def _lock(model: CLIP, config: TrainConfig) -> None:
    """Freeze what the configuration says; what a model's owner froze stays frozen."""
    if config.lock_image:
        model.lock_image_tower(config.lock_image_unlocked_groups, config.lock_image_freeze_bn_stats)
    if config.lock_text:
        model.lock_text_tower(config.lock_text_unlocked_layers)
