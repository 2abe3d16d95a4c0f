"""The file of a benchmark run: every round of every side, and where it ran.

``benchmarks/results/<machine>/<commit>.json`` holds one run. Times are kept round by round: sides that ran in the same
round met the same machine, so that their ratio says more than their times.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from clipfast.files import write_atomically

FORMAT = 1
OURS = "clipfast"
"""The side that a user gets: for whole models, with exact shortcuts."""
DENSE = "clipfast, dense"
"""The same with every token computed."""


@dataclass(frozen=True)
class Side:
    """One implementation's figures in a row.

    Attributes:
        device_s: Seconds of a call on the device, a figure a round; on the CPU, wall time.
        host_s: Seconds until a call returned to Python, a figure a round.
        peak_bytes: The most memory that a call took beyond what was there before it.
        saved_bytes: What its forward pass keeps for the backward pass, beside inputs and parameters.
        error: max|result − oracle| over max|oracle|, of the result that is furthest off; None where results are not
            numbers to compare.
    """

    device_s: list[float]
    host_s: list[float]
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error: float | None = None

    @property
    def seconds(self) -> float:
        """The median time on the device."""
        return statistics.median(self.device_s)


@dataclass(frozen=True)
class Row:
    """One thing that was measured, by every side that is there.

    Attributes:
        op: What it is: ``"attention"``, ``"towers"``, ...; the benchmark file's name.
        name: What exactly, unique in a run.
        label: A few words for charts.
        direction: ``"forward"``, ``"forward and backward"`` or ``"step"``.
        dtype: ``"float32"``, ``"bfloat16"``, ...
        unit: What a call computes, in the plural: ``"images"``.
        items: How many of them.
        flops: Operations that the computation needs, by definition of the dense op; None where they do not count.
        bytes: What it must read and write at least.
        limit_s: The least time that the machine's two limits allow: the larger of operations over the matrix product's
            rate and bytes over the copy's.
        series: Rows of one series differ by one axis alone; None for a row by itself.
        axis: That axis: ``"batch"`` or ``"tokens"``.
        at: Where on the axis.
        law: The exponents that theory gives for the series: ``{"time": 2, "memory": 1}``.
        sides: Figures by name; :data:`OURS` first, then :data:`DENSE` where there is one, then rivals.
        missing: Why sides are absent, by name: ``"not installed"``.
        facts: More, for readers that know the op: ``shape_class`` and ``backward`` for the dispatch table, and
            ``served_by``, the implementation that served clipfast's call.
    """

    op: str
    name: str
    label: str
    direction: str
    dtype: str
    unit: str
    items: int
    flops: float | None = None
    bytes: float | None = None
    limit_s: float | None = None
    series: str | None = None
    axis: str | None = None
    at: float | None = None
    law: dict[str, float] = field(default_factory=dict)
    sides: dict[str, Side] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def ratio(self, side: str, to: str = OURS) -> float:
        """The median over rounds of one side's time by another's in the same round: above 1, the other is faster."""
        pairs = zip(self.sides[side].device_s, self.sides[to].device_s, strict=True)
        return statistics.median(a / b for a, b in pairs)

    @property
    def rivals(self) -> list[str]:
        """The sides that are not clipfast's."""
        return [name for name in self.sides if not name.startswith(OURS)]


@dataclass(frozen=True)
class Limits:
    """What the machine can do, measured in the same run.

    Attributes:
        copy_gb_per_s: Bytes read and written by a copy of a large tensor, in 10⁹ a second.
        product_tflop_per_s: The rate of a large square matrix product by dtype, in 10¹² operations a second.
    """

    copy_gb_per_s: float
    product_tflop_per_s: dict[str, float]


@dataclass(frozen=True)
class Run:
    """One run of the benchmarks.

    Attributes:
        machine: Name of the card, or of the processor where there is no card.
        device: ``"cuda"`` or ``"cpu"``.
        details: ``threads``, ``cores``, ``torch``, ``triton``, ``cuda``, ``driver``, ``python``, ``clipfast`` and the
            versions of rivals, as text.
        commit: Of the working tree, with ``-dirty`` where it was changed; the version where there is no repository.
        date: ``YYYY-MM-DD``.
        scale: ``"short"``, ``"full"`` or ``"smoke"``.
        complete: Whether all benchmarks ran, and not a selection.
        limits: The machine's.
        rows: In the order of measuring.
    """

    machine: str
    device: str
    details: dict[str, str]
    commit: str
    date: str
    scale: str
    complete: bool
    limits: Limits
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        """The row of that name."""
        return next((row for row in self.rows if row.name == name), None)


def write_run(path: Path, run: Run) -> None:
    """Write a run as JSON, whole or not at all. Figures keep six digits, two more than any clock here is good for."""
    content = {"format": FORMAT} | _rounded(_as_json(run))
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(path, lambda file: file.write(f"{text}\n".encode()))


def read_run(path: Path) -> Run:
    """Read a run.

    Raises:
        ValueError: The file is not one of a run, or of a later format.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise ValueError(f"format is not {FORMAT}")
        rows = [
            Row(**row | {"sides": {name: Side(**side) for name, side in row["sides"].items()}})
            for row in content.pop("rows")
        ]
        return Run(**content | {"limits": Limits(**content["limits"]), "rows": rows})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: expected a file of a benchmark run, got one that is not: {error}") from error


def read_runs(path: Path) -> list[Run]:
    """Read a run, or all runs of a folder, by the order of their files' names.

    Raises:
        ValueError: A file is not one of a run, or a folder has none.
        OSError: One cannot be read.
    """
    if not path.is_dir():
        return [read_run(path)]
    files = sorted(path.glob("*.json"))
    if not files:
        raise ValueError(f"{path}: expected a folder with files of benchmark runs, got one without any .json")
    return [read_run(file) for file in files]


def _as_json(value: Any) -> Any:
    if isinstance(value, (Run, Row, Side, Limits)):
        return {f.name: _as_json(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    return value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
