"""Measurements of cards that are shipped: which implementation was the fastest, by card, op and class of calls.

The plan goes by them where no tuned file speaks (:mod:`clipfast.ops.plan`). A card's entry is what ``clipfast tune
--share`` prints on it; the record in ``benchmarks/results/`` that it prints too holds the times. No card has been
measured so far.
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
        fastest: For every op and class of calls (:func:`clipfast.ops.dispatch.shape_class`), the fastest backend.
    """

    torch: str
    triton: str
    commit: str
    fastest: dict[str, dict[str, str]]


# by the name that torch.cuda.get_device_name gives; "cpu" for the CPU
CARDS: dict[str, Measurements] = {}
