"""Freezing a tower but for its last groups of layers, as open_clip groups them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

Group = Sequence[nn.Module | nn.Parameter | None]


def set_trainable(parts: Iterable[nn.Module | nn.Parameter | None], trainable: bool) -> None:
    """Let the parameters of ``parts`` get gradients, or not; None is passed over."""
    for part in parts:
        if part is not None:
            part.requires_grad_(trainable)


def unlock_last(groups: Sequence[Group], count: int) -> None:
    """Let the last ``count`` groups get gradients; all of them where there are fewer.

    A negative count leaves out as many of the first groups and unlocks the others, as in open_clip.
    """
    if count:
        for group in groups[-count:]:
            set_trainable(group, True)
