"""The card that a launcher asks about: the device's own, or one that it is told to pretend.

Configurations are compiled ahead of time (:mod:`~clipfast.kernels.aot`) for cards that are not there. The launcher that
chooses them is the one that runs, and it asks here.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """What a launcher needs to know.

    Attributes:
        capability: The compute capability, such as ``(9, 0)``.
        multiprocessors: Streaming multiprocessors.
    """

    capability: tuple[int, int]
    multiprocessors: int


_pretended: Card | None = None


@contextlib.contextmanager
def pretend(card: Card) -> Iterator[None]:
    """Let launchers choose for a card, whatever device their tensors are on."""
    global _pretended
    before, _pretended = _pretended, card
    try:
        yield
    finally:
        _pretended = before


def capability(device: torch.device) -> tuple[int, int]:
    """Return a device's compute capability; the interpreter on the CPU runs what a Hopper card would."""
    if _pretended is not None:
        return _pretended.capability
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def multiprocessors(device: torch.device, interpreted: int = 2) -> int:
    """Return the streaming multiprocessors of a device; in the interpreter a few, so that there are partial sums."""
    if _pretended is not None:
        return _pretended.multiprocessors
    return _count(device) if device.type == "cuda" else interpreted


@functools.cache
def _count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
