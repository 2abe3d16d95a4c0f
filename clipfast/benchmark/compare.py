"""Two runs of the same benchmarks: what became slower, beyond what noise would do.

Clocks of two runs cannot be compared on a machine that is not quiet. Each run holds the rivals' times of the same
rounds, and rivals did not change: a row is compared by clipfast's time over theirs in the same round.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Literal

from clipfast.benchmark.results import OURS, Row, Run

THRESHOLD = 0.10
"""The smallest change that is called one. Two runs of the same code differed by more in 9 of 105 rows."""
_SIGMAS = 4.0
_MAY_DIFFER = {"clipfast", "python", "driver"}

Verdict = Literal["slower", "faster", "same", "too noisy to tell"]


@dataclass(frozen=True)
class Change:
    """How one side of a row changed.

    Attributes:
        row: The row's name.
        side: ``"clipfast"`` or one that begins with it.
        ratio: The second run's time over the first's, by paired ratios: 1.2 is 20% slower.
        noise: Four standard errors of the ratio's logarithm, from the spread of the rounds.
        anchors: The sides that both were measured against; none where a row has no rival in both.
        verdict: ``"too noisy to tell"`` where the noise exceeds the change that it should show.
    """

    row: str
    side: str
    ratio: float
    noise: float
    anchors: tuple[str, ...]
    verdict: Verdict


def compare(before: Run, after: Run, threshold: float = THRESHOLD) -> list[Change]:
    """Compare two runs, row by row.

    Args:
        before: The first run.
        after: The second.
        threshold: The smallest change of time that is called one, as a share.

    Returns:
        A change for every side of clipfast's in every row that both runs have.

    Raises:
        ValueError: The runs are of different machines, threads or versions of PyTorch or rivals, or share no row.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: got {threshold}, expected a share between 0 and 1")
    for what, a, b in [
        ("machine", before.machine, after.machine),
        ("device", before.device, after.device),
        *(
            (key, before.details[key], after.details[key])
            for key in sorted(before.details.keys() & after.details.keys())
        ),
    ]:
        if a != b and what not in _MAY_DIFFER:
            raise ValueError(f"{what}: got {a!r} and {b!r}, expected the same in both runs")
    changes = []
    for row in after.rows:
        was = before.row(row.name)
        if was is not None:
            sides = [name for name in row.sides if name.startswith(OURS) and name in was.sides]
            changes += [_change(was, row, side, threshold) for side in sides]
    if not changes:
        raise ValueError("the runs have no row in common")
    return changes


def _change(before: Row, after: Row, side: str, threshold: float) -> Change:
    anchors = tuple(name for name in before.rivals if name in after.sides)
    first, second = _logarithms(before, side, anchors), _logarithms(after, side, anchors)
    difference = statistics.median(second) - statistics.median(first)
    noise = _SIGMAS * math.hypot(_error_of_median(first), _error_of_median(second))
    least = math.log1p(threshold)
    if abs(difference) > max(least, noise):
        verdict: Verdict = "slower" if difference > 0 else "faster"
    else:
        verdict = "too noisy to tell" if noise > 2 * least else "same"
    return Change(after.name, side, math.exp(difference), noise, anchors, verdict)


def _logarithms(row: Row, side: str, anchors: tuple[str, ...]) -> list[float]:
    """The logarithm of a side's time over the geometric mean of the anchors', round by round."""
    rounds = range(len(row.sides[side].device_s))
    mean = [
        statistics.fmean(math.log(row.sides[name].device_s[i]) for name in anchors) if anchors else 0.0 for i in rounds
    ]
    return [math.log(row.sides[side].device_s[i]) - mean[i] for i in rounds]


def _error_of_median(values: list[float]) -> float:
    """The standard error of a median, from the median deviation, which single bad rounds do not move."""
    middle = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(v - middle) for v in values)
    return 1.2533 * deviation / math.sqrt(len(values))


def lines_of(changes: list[Change], *, everything: bool = False) -> list[str]:
    """Return the changes as text: those that are none in a line at the end, unless ``everything`` is asked for."""
    lines = []
    for verdict in ("slower", "faster", "too noisy to tell", "same"):
        found = [change for change in changes if change.verdict == verdict]
        if verdict == "same" and not everything:
            continue
        for change in sorted(found, key=lambda change: -abs(math.log(change.ratio))):
            against = f"against {', '.join(change.anchors)}" if change.anchors else "by the clock: no rival in both"
            noise = math.expm1(change.noise)
            lines.append(f"{verdict:<18} {change.ratio:5.2f} × ± {noise:.0%}  {change.side}: {change.row} ({against})")
    counts = {
        v: sum(change.verdict == v for change in changes) for v in ("slower", "faster", "too noisy to tell", "same")
    }
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return lines
