"""AdamW as CLIP is trained with it: which parameters decay, and how the learning rate goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from clipfast.train.config import Schedule


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    weights: Mapping[str, Tensor] | None = None,
    *,
    decay_positions: bool = False,
) -> list[dict[str, object]]:
    """Split the trainable parameters of ``model`` into those that decay and those that do not.

    Biases, norms and scalars (``logit_scale``, ``logit_bias``) do not decay, nor what ``model.no_weight_decay()``
    names, if the model has that method (position and class embeddings).

    Args:
        model: The model.
        weight_decay: Of those that decay.
        weights: What stands for the parameters, by their names: copies in full precision.
        decay_positions: Whether position embeddings and the probe of attention pooling decay too. These groups are then
            those of open_clip's ``main.py``, which spares what has one dimension.

    Returns:
        Parameter groups for a ``torch.optim`` optimizer, the decaying one first. Tensors that are sharded over ranks
        never share one with tensors that are not.
    """
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") and not decay_positions else set()
    groups: dict[tuple[bool, bool], list[Tensor]] = {(True, False): [], (False, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # timm's probe has three dimensions, ours one
            decays = name not in spared and (parameter.ndim >= 2 or (decay_positions and name.endswith(".probe")))
            weight = parameter if weights is None else weights[name]
            groups.setdefault((decays, isinstance(weight, DTensor)), []).append(weight)
    return [
        {"params": chosen, "weight_decay": weight_decay if decays else 0.0}
        for (decays, _), chosen in groups.items()
        if chosen
    ]


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    weights: Mapping[str, Tensor] | None = None,
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    decay_positions: bool = False,
) -> torch.optim.AdamW:
    """Make AdamW with the betas and eps of CLIP's vision transformers (Radford et al., 2021, table 18)."""
    groups = parameter_groups(model, weight_decay, weights, decay_positions=decay_positions)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm of all gradients together, over the ranks that hold shards of them."""
    shards = [g for g in gradients if isinstance(g, DTensor)]
    whole = [g for g in gradients if not isinstance(g, DTensor)]
    total = torch.nn.utils.get_total_norm(whole) if whole else None
    if shards:
        squares = torch.nn.utils.get_total_norm([g.to_local() for g in shards]).square()
        dist.all_reduce(squares, group=shards[0].device_mesh.get_group())
        total = squares.sqrt() if total is None else (squares + total.square()).sqrt()
    return total


def clip_gradients(gradients: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """Scale gradients down, in place, to a norm of at most ``max_norm``; return the norm they had."""
    norm = gradient_norm(gradients)
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in gradients:
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            by_device.setdefault(local.device, []).append(local)
        for device, group in by_device.items():
            torch._foreach_mul_(group, factor.to(device))
    return norm


def copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, in as few launches as the device can do with."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def move_towards(averages: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
    """Move averages towards weights by a share of the way, each as ``lerp_`` does."""
    # shards of FSDP2 and whole tensors are two lists
    for sharded in (False, True):
        pairs = [(a, w) for a, w in zip(averages, weights, strict=True) if isinstance(a, DTensor) is sharded]
        if pairs:
            torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), share)


def step_if(optimizer: torch.optim.Optimizer, sound: Tensor, scaler: torch.amp.GradScaler) -> None:
    """Take a step if ``sound`` holds, which nobody waits for: otherwise weights and moments stay, bit for bit.

    A fused optimizer leaves everything as it is where it is told that gradients were not finite. It is told the same of
    whatever else makes a step unsound.

    Args:
        optimizer: A fused one.
        sound: A bool, a scalar on the optimizer's device.
        scaler: Of fp16, or one that is not enabled. The first skips steps for reasons of its own, and knows of
            ``sound`` by :func:`mark_unsound`.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        return
    optimizer.grad_scale, optimizer.found_inf = None, torch.where(sound, 0.0, 1.0)
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf


def mark_unsound(gradients: Sequence[Tensor], sound: Tensor) -> None:
    """Make a gradient NaN unless ``sound`` holds, so that fp16's scaler skips the step; else all stay, bit for bit."""
    whole = next(g for g in gradients if not isinstance(g, DTensor))
    whole.mul_(torch.where(sound, 1.0, torch.nan).to(whole.device))


def learning_rate_share(schedule: Schedule, step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate that optimizer step ``step`` takes, by a schedule of that name.

    ``"constant"`` stays at the peak after the warm-up; for ``"cosine"`` see :func:`warmup_cosine`.
    """
    if schedule == "constant":
        return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup_cosine(step, steps, warmup_steps)


def warmup_cosine(step: int, steps: int, warmup_steps: int) -> float:
    """The share of the peak learning rate that optimizer step ``step`` takes.

    It rises linearly over ``warmup_steps``, then falls along half a cosine (Loshchilov & Hutter, 2016) towards 0,
    which would be reached at ``steps``.

    Args:
        step: counted from 0.
        steps: of the whole run.
        warmup_steps: of these, those that warm up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
