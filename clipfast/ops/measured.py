"""Which implementation was the fastest, by card, op and shape class: what ``auto`` goes by.

A card's entry comes from ``clipfast tune --share`` on it (docs/tuning.md); the record in ``benchmarks/results/`` holds
the times. No card has been measured so far.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurements:
    """What one card gave.

    Attributes:
        torch: PyTorch's version.
        triton: Triton's version.
        commit: Of clipfast, as in the name of the run's file.
        fastest: For every op and shape class (:func:`clipfast.ops.dispatch.shape_class`), the fastest backend.
    """

    torch: str
    triton: str
    commit: str
    fastest: dict[str, dict[str, str]]


# by the name that torch.cuda.get_device_name gives; "cpu" for the CPU
CARDS: dict[str, Measurements] = {}
