"""Which implementation was the fastest, by card, op and shape class: what ``auto`` goes by.

A card's entry comes from one run of ``make gpu`` on it; the run's file in ``benchmarks/results/`` holds the times. No
card has been measured so far, so that ``auto`` takes no implementation that must be.
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
