"""AdamW as CLIP is trained with it: which parameters decay, and how the learning rate goes."""

from __future__ import annotations

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split the trainable parameters of ``model`` into those that decay and those that do not.

    Biases, norms and scalars (``logit_scale``) do not decay, nor what ``model.no_weight_decay()`` names, if the
    model has that method (position and class embeddings).

    Returns:
        Two parameter groups for a ``torch.optim`` optimizer, the decaying one first.
    """
    spared = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    decaying, sparing = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (sparing if parameter.ndim < 2 or name in spared else decaying).append(parameter)
    return [{"params": decaying, "weight_decay": weight_decay}, {"params": sparing, "weight_decay": 0.0}]


def make_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """Make AdamW with the betas and eps of CLIP's vision transformers (Radford et al., 2021, table 18)."""
    groups = parameter_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


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
