"""The same benchmarks before and after a change: what became slower, beyond what noise would do.

Clocks of two runs cannot be compared on a machine that is not quiet. Each run holds the rivals' times of the same
rounds, and rivals did not change: a row is compared by clipfast's time over theirs in the same round. What differs
between two processes of the same code (where memory lies, what else the machine does) is not seen within one, which is
why either side may be several runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clipfast.benchmark.results import OURS, Row, Run

THRESHOLD = 0.10
"""The smallest change that is called one."""
_MAY_DIFFER = {"clipfast", "python", "driver"}
_SIGMAS = 4.0  # with one run a side: of the rounds' standard error
# With several: Student's t, by degrees of freedom, that is exceeded once in a thousand times; the last for more of them
_STUDENT = (636.6, 31.60, 12.92, 8.610, 6.869, 5.959, 5.408, 5.041, 4.781, 4.587)

Verdict = Literal["slower", "faster", "same", "too noisy to tell"]


@dataclass(frozen=True)
class Change:
    """How one side of a row changed.

    Attributes:
        row: The row's name.
        side: ``"clipfast"`` or one that begins with it.
        ratio: The time after over the time before, by paired ratios: 1.2 is 20% slower.
        noise: What the ratio's logarithm may be off by: from the spread of the runs; with one run before and one after,
            four standard errors from the spread of the rounds.
        anchors: The rivals that it was measured against: of each by itself and all together, what followed clipfast's
            time most closely while nothing changed. None where a row has no rival in all runs.
        runs: How many runs were there before, and after.
        verdict: ``"too noisy to tell"`` where the noise is more than twice the threshold, or hides a change of more
            than the threshold.
    """

    row: str
    side: str
    ratio: float
    noise: float
    anchors: tuple[str, ...]
    runs: tuple[int, int]
    verdict: Verdict


def compare(before: Sequence[Run], after: Sequence[Run], threshold: float = THRESHOLD) -> list[Change]:
    """Compare runs, row by row.

    Args:
        before: Runs of one state of the code, each in a process of its own.
        after: Runs of another state, best made in turn with those before. Three a side at least tell what differs
            between processes; with one a side, the spread of the rounds has to do.
        threshold: The smallest change of time that is called one, as a share.

    Returns:
        A change for every side of clipfast's in every row that was measured before and after.

    Raises:
        ValueError: There is no run, or runs are of different machines, threads or versions of PyTorch or rivals, or
            share no row, or those of one side are of different commits.
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold: got {threshold}, expected a share between 0 and 1")
    for name, runs in (("before", before), ("after", after)):
        commits = sorted({run.commit for run in runs})
        if len(commits) != 1:
            raise ValueError(f"{name}: got {', '.join(commits) or 'no run'}, expected runs of one commit")
    for run in (*before[1:], *after):
        _check_same_place(before[0], run)
    changes = []
    for name in dict.fromkeys(row.name for run in after for row in run.rows):
        first, second = ([row for run in runs if (row := run.row(name))] for runs in (before, after))
        if first and second:
            common = [side for side in second[0].sides if all(side in row.sides for row in (*first, *second))]
            changes += [_change(first, second, side, common, threshold) for side in common if side.startswith(OURS)]
    if not changes:
        raise ValueError("the runs have no row in common")
    return changes


def _check_same_place(one: Run, other: Run) -> None:
    for what, a, b in [
        ("machine", one.machine, other.machine),
        ("device", one.device, other.device),
        *((key, one.details[key], other.details[key]) for key in sorted(one.details.keys() & other.details.keys())),
    ]:
        if a != b and what not in _MAY_DIFFER:
            raise ValueError(f"{what}: got {a!r} and {b!r}, expected the same in all runs")


def _change(before: list[Row], after: list[Row], side: str, common: list[str], threshold: float) -> Change:
    rivals = [name for name in after[0].rivals if name in common]
    choices = [(name,) for name in rivals] + ([tuple(rivals)] if len(rivals) != 1 else [])
    found = []
    for anchors in choices:
        first, second = ([_logarithms(row, side, anchors) for row in rows] for rows in (before, after))
        found.append((_noise(first, second), _middle(second) - _middle(first), anchors))
    noise, difference, anchors = min(found, key=lambda one: one[0])
    least = math.log1p(threshold)
    if abs(difference) > max(least, noise):
        verdict: Verdict = "slower" if difference > 0 else "faster"
    else:
        # a change that would count, were it not for the noise, is not called none
        verdict = "too noisy to tell" if abs(difference) > least or noise > 2 * least else "same"
    return Change(after[0].name, side, math.exp(difference), noise, anchors, (len(before), len(after)), verdict)


def _logarithms(row: Row, side: str, anchors: tuple[str, ...]) -> list[float]:
    """The logarithm of a side's time over the geometric mean of the anchors', round by round."""
    rounds = range(len(row.sides[side].device_s))
    mean = [
        statistics.fmean(math.log(row.sides[name].device_s[i]) for name in anchors) if anchors else 0.0 for i in rounds
    ]
    return [math.log(row.sides[side].device_s[i]) - mean[i] for i in rounds]


def _middle(runs: list[list[float]]) -> float:
    return statistics.fmean(statistics.median(rounds) for rounds in runs)


def _noise(before: list[list[float]], after: list[list[float]]) -> float:
    """What the difference of the two middles may be off by while nothing changed."""
    sides = (before, after)
    within = statistics.fmean(_error_of_median(rounds) ** 2 for runs in sides for rounds in runs)
    freedom = len(before) + len(after) - 2
    if not freedom:
        return _SIGMAS * math.sqrt(2 * within)
    between = sum((statistics.median(rounds) - _middle(runs)) ** 2 for runs in sides for rounds in runs) / freedom
    # by chance, few runs lie closer together than their own rounds allow
    variance = max(between, within) * (1 / len(before) + 1 / len(after))
    return _STUDENT[min(freedom, len(_STUDENT)) - 1] * math.sqrt(variance)


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
    if any(change.runs == (1, 1) for change in changes):
        lines.append(
            "One run before and one after: what differs between two processes of the same code is not in the noise. "
            "Folders of three or more runs a side tell."
        )
    return lines
