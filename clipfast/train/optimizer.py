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
    model: nn.Module, weight_decay: float, weights: Mapping[str, Tensor] | None = None
) -> list[dict[str, object]]:
    """Split the trainable parameters of ``model`` into those that decay and those that do not.

    Biases, norms and scalars (``logit_scale``) do not decay, nor what ``model.no_weight_decay()`` names, if the
    model has that method (position and class embeddings).

    Args:
        model: The model.
        weight_decay: Of those that decay.
        weights: What stands for the parameters, by their names: copies in full precision.

    Returns:
        Parameter groups for a ``torch.optim`` optimizer, the decaying one first. Tensors that are sharded over ranks
        never share one with tensors that are not.
    """
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[bool, bool], list[Tensor]] = {(True, False): [], (False, False): []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and name not in spared
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
) -> torch.optim.AdamW:
    """Make AdamW with the betas and eps of CLIP's vision transformers (Radford et al., 2021, table 18)."""
    groups = parameter_groups(model, weight_decay, weights)
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
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(factor.to(gradient.device))
    return norm


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
