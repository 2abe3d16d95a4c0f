"""The groups of a report, in the order of what users gain."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipfast.benchmark.results import OURS, Row, Run
from clipfast.benchmark.summary import OPS, best_rival, own_operator, speed_ups

_HEADINGS = OPS | {
    "prompts": "Zero-shot prompts",
    "step": "Training step",
    "dispatch": "What the choice of an implementation costs a call",
}
# what users run, and what stands around it; what it is made of comes after both
_LEVELS = (("prompts", "step", "accelerate", "towers", "contrastive_loss"), ("data", "tokenizer", "training"))


@dataclass(frozen=True)
class Group:
    """Rows that stand below one heading.

    Attributes:
        heading: In words.
        rows: Those in which clipfast computes otherwise than PyTorch, or which do not tell.
        same: Those in which clipfast calls PyTorch's own operator: a tie with PyTorch is by construction.
    """

    heading: str
    rows: list[Row]
    same: list[Row]

    @property
    def gain(self) -> float | None:
        """The fastest rival's time over clipfast's, the geometric mean of ``rows``; None where no rival was there."""
        ratios = self._fastest_ratios
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    @property
    def fastest(self) -> tuple[float, float, int] | None:
        """The least and the most of the fastest rivals' ratios in ``rows``, and how many rows have one."""
        ratios = self._fastest_ratios
        return (min(ratios), max(ratios), len(ratios)) if ratios else None

    @property
    def ties(self) -> tuple[float, float] | None:
        """The least and the most of all rivals' ratios in ``same``."""
        ratios = [found.ratio for row in self.same if OURS in row.sides for found in speed_ups(row)]
        return (min(ratios), max(ratios)) if ratios else None

    @property
    def _fastest_ratios(self) -> list[float]:
        return [found.ratio for row in self.rows if (found := best_rival(row)) is not None]


def key_of(row: Row) -> str:
    """Return what a row is grouped by: its op, with prompts and training steps taken out of the towers."""
    if row.op == "towers" and row.unit == "pairs":
        return "step"
    return "prompts" if row.op == "towers" and row.unit == "prompts" else row.op


def groups_of(run: Run) -> list[Group]:
    """Return a run's rows in groups.

    First what users run (towers, prompts, training, the loss), then what stands around it (data, tokenizer, the
    engine), then what it is made of; within each of the three, the larger gain comes first.
    """
    by_key: dict[str, list[Row]] = {}
    for row in run.rows:
        by_key.setdefault(key_of(row), []).append(row)
    groups = {
        key: Group(
            _HEADINGS.get(key, key),
            [row for row in rows if own_operator(row) is None],
            [row for row in rows if own_operator(row) is not None],
        )
        for key, rows in by_key.items()
    }

    def place(key: str) -> tuple[int, float, str]:
        level = next((i for i, keys in enumerate(_LEVELS) if key in keys), len(_LEVELS))
        gain = groups[key].gain
        if gain is None and groups[key].same:
            gain = 1.0  # a tie, by construction
        return level, math.inf if gain is None else -gain, key

    return [groups[key] for key in sorted(groups, key=place)]
