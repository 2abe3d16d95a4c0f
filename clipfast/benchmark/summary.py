"""What a run comes to: speed-ups, shares of the limit, exponents; nothing is drawn here."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from clipfast.benchmark.results import DENSE, OURS, Row, Run, Side

OPS = {
    "attention": "Attention",
    "layer_norm": "LayerNorm, and residual + LayerNorm",
    "bias_gelu": "Bias + GELU",
    "block": "A transformer block",
    "contrastive_loss": "Contrastive loss",
    "towers": "Whole towers",
    "accelerate": "One line: clipfast.accelerate(model)",
    "training": "The training engine",
    "data": "Data path",
    "tokenizer": "Tokenizer",
}
"""Headings by op, in the order of a table; other ops follow by name."""

# what an implementation that only calls an operator of PyTorch's calls itself, beside all of the reference backend
_OWN_OPERATORS = ("scaled_dot_product_attention", "varlen_attn")
_COUNTED = 1e6


def ops_of(run: Run) -> list[str]:
    """Return the ops that a run has rows of, in the order of a table."""
    present = {row.op for row in run.rows}
    return [op for op in OPS if op in present] + sorted(present - OPS.keys())


@dataclass(frozen=True)
class SpeedUp:
    """How many times as long a rival takes.

    Attributes:
        rival: Its name.
        ratio: Its time over ours, the median over rounds.
        low: The first quartile of the rounds.
        high: The third.
    """

    rival: str
    ratio: float
    low: float
    high: float


def speed_ups(row: Row, ours: str = OURS) -> list[SpeedUp]:
    """Return how many times as long each rival takes as ``ours``, in the row's order."""
    found = []
    for rival in row.rivals:
        pairs = zip(row.sides[rival].device_s, row.sides[ours].device_s, strict=True)
        ratios = [a / b for a, b in pairs]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        found.append(SpeedUp(rival, statistics.median(ratios), low, high))
    return found


def best_rival(row: Row, ours: str = OURS) -> SpeedUp | None:
    """Return the fastest rival; None where there is none."""
    return min(speed_ups(row, ours), key=lambda found: found.ratio, default=None) if ours in row.sides else None


def own_operator(row: Row) -> str | None:
    """Return what serves clipfast's call where PyTorch's own operator does: the two sides then run the same code.

    None where an implementation of clipfast's does, and in rows of models and of records that do not say.
    """
    backend, _, words = str(row.facts.get("served_by", "")).partition(" (")
    words = words.removesuffix(")")
    if backend == "reference" or (backend == "torch" and words.endswith(_OWN_OPERATORS)):
        return words or backend
    return None


def is_counted(count: int | None, device: str) -> bool:
    """Return whether a peak is more than the counting loses: a megabyte on a CPU (:mod:`clipfast.benchmark.memory`)."""
    return count is not None and count >= (_COUNTED if device == "cpu" else 1)


def memory_ratio(row: Row, rival: str, device: str, ours: str = OURS) -> float | None:
    """Return a rival's peak memory over ours; None where one of the two counted nothing."""
    theirs, mine = row.sides[rival].peak_bytes, row.sides[ours].peak_bytes
    return theirs / mine if is_counted(theirs, device) and is_counted(mine, device) else None


def shortcut_gain(row: Row) -> float | None:
    """Return the dense time over that with exact shortcuts; None where there is no choice."""
    return row.ratio(DENSE) if DENSE in row.sides and OURS in row.sides else None


def rate(amount: float | None, side: Side) -> float | None:
    """Return an amount a second, None where there is none."""
    return None if amount is None else amount / side.seconds


def does_it_all(row: Row, name: str) -> bool:
    """Return whether a side does all operations of the row: not one with exact shortcuts.

    It has them where a dense side stands beside it, and in accelerated models, which no row measures dense.
    """
    return name != OURS or (DENSE not in row.sides and row.op != "accelerate")


def share_of_limit(row: Row, name: str) -> float | None:
    """Return the least time that the machine allows over a side's; None where it leaves operations out."""
    return row.limit_s / row.sides[name].seconds if row.limit_s is not None and does_it_all(row, name) else None


@dataclass(frozen=True)
class Line:
    """A side of a series: a figure over the axis.

    Attributes:
        series: The series' name.
        axis: ``"batch"`` or ``"tokens"``.
        side: The side's name.
        what: ``"time"`` in seconds, or ``"memory"`` in bytes.
        at: Where on the axis, ascending.
        values: The figures there.
        law: The exponent of theory, None where none is claimed.
    """

    series: str
    axis: str
    side: str
    what: str
    at: list[float]
    values: list[float]
    law: float | None

    @property
    def slope(self) -> float | None:
        """The exponent, by least squares in logarithms; None for fewer than two points."""
        return _slope(self.at, self.values)

    @property
    def upper_slope(self) -> float | None:
        """The exponent of the larger half, at least two points, where fixed costs matter least."""
        count = max(2, math.ceil(len(self.at) / 2))
        return _slope(self.at[-count:], self.values[-count:])


def _slope(at: list[float], values: list[float]) -> float | None:
    if len(at) < 2 or len(set(at)) < 2:
        return None
    return statistics.linear_regression([math.log(x) for x in at], [math.log(y) for y in values]).slope


def series_of(run: Run) -> list[str]:
    """Return the names of the series with two points or more."""
    points: dict[str, set[float]] = {}
    for row in run.rows:
        if row.series is not None and row.at is not None:
            points.setdefault(row.series, set()).add(row.at)
    return [name for name, at in points.items() if len(at) > 1]


def lines_of(run: Run, series: str, what: str) -> list[Line]:
    """Return the sides of a series that have two points or more of a figure.

    Args:
        run: The run.
        series: The series' name.
        what: ``"time"`` or ``"memory"``.
    """
    rows = sorted((row for row in run.rows if row.series == series and row.at), key=lambda row: row.at or 0)
    names = list(dict.fromkeys(name for row in rows for name in row.sides))
    lines = []
    for name in names:
        points = []
        for row in rows:
            if name in row.sides:
                side = row.sides[name]
                value = side.seconds if what == "time" else side.peak_bytes
                if value:  # nothing that was counted has no logarithm
                    points.append((float(row.at or 0), float(value)))
        if len(points) > 1:
            at, values = (list(column) for column in zip(*points, strict=True))
            lines.append(Line(series, rows[0].axis or "", name, what, at, values, rows[0].law.get(what)))
    return lines


# --- words --------------------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    """Return a time with three digits and its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{_three_digits(seconds * factor)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns"


def bytes_text(count: float | None) -> str:
    """Return bytes with their unit, in powers of ten; a dash for none."""
    if count is None:
        return "–"
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{_three_digits(count / factor)} {unit}"
    return f"{count / 1e3:.0f} kB"


def number_text(value: float | None, spec: str = ".1f", unit: str = "") -> str:
    """Return a number, a dash for none."""
    return "–" if value is None else f"{value:{spec}}{unit}"


def ratio_text(ratio: float) -> str:
    """Return a ratio with two or three digits: ``"0.012 ×"``, ``"0.93 ×"``, ``"10.2 ×"``, ``"140 ×"``."""
    if ratio < 0.1:
        return f"{ratio:.2g}\u00a0×"
    digits = max(0, min(2, 2 - math.floor(math.log10(ratio))))
    return f"{ratio:,.{digits}f}\u00a0×"


def machine_text(run: Run) -> str:
    """Return the machine in words, with the threads where it is a CPU."""
    threads = run.details.get("threads", "?")
    return f"{run.machine}, {threads} threads" if run.device == "cpu" else run.machine


def _three_digits(value: float) -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{digits}f}"
