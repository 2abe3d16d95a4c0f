"""A slowdown is seen through a machine whose clock drifts, and none is seen where there is none."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from clipfast.benchmark.compare import compare, lines_of
from clipfast.benchmark.results import Limits, Row, Run, Side

ROWS, ROUNDS = 40, 9


def run(
    seed: int, slower: dict[int, float] | None = None, noise: float = 0.02, drift: float = 0.5, process: float = 0.0
) -> Run:
    """A run of 40 rows whose machine goes from one speed to another in the middle of rows, as one that is shared.

    ``process`` is what differs between two processes of the same code: by how much clipfast and one rival that computes
    alike ("SDPA flash") run slower or faster throughout a row.
    """
    rng, rows = np.random.default_rng(seed), []
    for i in range(ROWS):
        speed = np.exp(np.cumsum(rng.normal(0, 0.05, ROUNDS)) + rng.normal(0, drift))
        alike = np.exp(rng.normal(0, process))

        def side(seconds: float, speed=speed) -> Side:
            times = list(map(float, seconds * speed * np.exp(rng.normal(0, noise, ROUNDS))))
            return Side(times, times)

        ours = 1e-3 * (slower or {}).get(i, 1.0)
        sides = {"clipfast": side(ours * alike), "PyTorch": side(2e-3), "open_clip": side(3e-3)}
        if process:
            sides["SDPA flash"] = side(1e-3 * alike)
        rows.append(Row("op", f"row {i}", f"{i}", "forward", "float32", "rows", 1, sides=sides))
    details = {"threads": "2", "torch": "2.13.0"}
    return Run("CPU", "cpu", details, "abc", "2026-01-01", "short", True, Limits(1.0, {"float32": 1.0}), rows)


@pytest.mark.parametrize("seed", range(5))
def test_a_slowdown_is_flagged_and_a_rerun_is_not(seed):
    before, again, slow = run(2 * seed), run(2 * seed + 1), run(2 * seed + 1, {3: 1.2, 17: 1.2, 30: 0.8})
    assert {change.verdict for change in compare([before], [again])} == {"same"}
    flagged = {change.row: change.verdict for change in compare([before], [slow]) if change.verdict != "same"}
    assert flagged == {"row 3": "slower", "row 17": "slower", "row 30": "faster"}


def test_the_clock_alone_would_not_do():
    """The same runs without rivals: drift is taken for a change, which is why rows are compared by their rivals."""

    def alone(run: Run) -> Run:
        return replace(run, rows=[replace(r, sides={"clipfast": r.sides["clipfast"]}) for r in run.rows])

    changes = compare([alone(run(0))], [alone(run(1))])
    assert any(change.verdict in ("slower", "faster") for change in changes)
    assert all(change.anchors == () for change in changes)


def test_the_ratio():
    changes = compare([run(0, noise=0.0)], [run(1, {5: 1.2}, noise=0.0)])
    assert changes[5].ratio == pytest.approx(1.2)
    assert changes[4].ratio == pytest.approx(1.0)
    assert changes[5].noise == pytest.approx(0.0, abs=1e-12)
    assert changes[5].anchors == ("PyTorch",)
    assert changes[5].runs == (1, 1)


@pytest.mark.parametrize("seed", range(5))
def test_what_differs_between_processes(seed):
    """Four runs a side know it, and find the rival that it moves too; one a side does not."""

    def runs(first: int, slower: dict[int, float] | None = None) -> list[Run]:
        return [run(100 * seed + first + i, slower, process=0.08) for i in range(4)]

    def without_twin(runs: list[Run]) -> list[Run]:
        return [replace(r, rows=[replace(x, sides=dict(list(x.sides.items())[:3])) for x in r.rows]) for r in runs]

    before, again, slow = runs(0), runs(10), runs(20, dict.fromkeys(range(0, ROWS, 2), 1.2))
    changes = compare(before, again)
    assert {change.verdict for change in changes} == {"same"}
    assert {change.anchors for change in changes} == {("SDPA flash",)}
    assert {change.runs for change in changes} == {(4, 4)}
    changes = compare(before, slow)
    assert [change.verdict for change in changes] == ["slower", "same"] * (ROWS // 2)

    before, again = without_twin(before), without_twin(again)
    verdicts = [change.verdict for change in compare(before, again)]
    assert not {"slower", "faster"} & set(verdicts)
    assert "too noisy to tell" in verdicts
    assert any(change.verdict in ("slower", "faster") for change in compare(before[:1], again[:1]))


def test_runs_that_agree_by_chance_are_as_noisy_as_their_rounds():
    before, after = run(0, noise=0.1), run(1, noise=0.1)
    alone, thrice = compare([before], [after]), compare([before] * 3, [after] * 3)
    for one, three in zip(alone, thrice, strict=True):
        # Student's t at four degrees of freedom for three runs a side, four standard errors for one
        assert three.noise * math.sqrt(3) / 8.61 == pytest.approx(one.noise / 4)


def test_noise_that_would_hide_a_change_is_told():
    changes = compare([run(0, noise=0.6)], [run(1, noise=0.6)])
    verdicts = [change.verdict for change in changes]
    assert verdicts.count("too noisy to tell") > ROWS / 2
    least = math.log(1.1)
    for change in changes:
        hidden = least < abs(math.log(change.ratio)) <= change.noise
        assert (change.verdict == "too noisy to tell") == (hidden or least < change.noise / 2)


def test_one_bad_round_in_nine_changes_nothing():
    before, after = run(0), run(1)
    for row in after.rows:
        row.sides["clipfast"].device_s[4] *= 10
    assert {change.verdict for change in compare([before], [after])} == {"same"}


def test_every_side_of_ours_is_compared():
    before, after = run(0), run(1)
    for r in (before, after):
        r.rows[0].sides["clipfast, dense"] = r.rows[0].sides["clipfast"]
    assert [c.side for c in compare([before], [after])[:2]] == ["clipfast", "clipfast, dense"]


def test_what_cannot_be_compared_is_refused():
    before = run(0)
    with pytest.raises(ValueError, match="machine: got 'CPU' and 'H100', expected the same in all runs"):
        compare([before], [replace(before, machine="H100")])
    with pytest.raises(ValueError, match="threads: got '2' and '4', expected the same in all runs"):
        compare([before], [replace(before, details=before.details | {"threads": "4"})])
    with pytest.raises(ValueError, match="torch: got '2.13.0' and '2.14.0'"):
        compare([before], [replace(before, details=before.details | {"torch": "2.14.0"})])
    compare([before], [replace(before, details=before.details | {"clipfast": "0.2.0"})])
    with pytest.raises(ValueError, match="the runs have no row in common"):
        compare([before], [replace(before, rows=[])])
    with pytest.raises(ValueError, match="before: got abc, def, expected runs of one commit"):
        compare([before, replace(before, commit="def")], [before])
    with pytest.raises(ValueError, match="after: got no run, expected runs of one commit"):
        compare([before], [])
    with pytest.raises(ValueError, match="machine: got 'CPU' and 'H100'"):
        compare([before, replace(before, machine="H100")], [before])
    with pytest.raises(ValueError, match="threshold: got 1.5"):
        compare([before], [before], threshold=1.5)


def test_the_text():
    lines = lines_of(compare([run(0)], [run(1, {3: 1.3})]))
    assert len(lines) == 3
    assert lines[0].startswith("slower")
    assert "clipfast: row 3 (against PyTorch, open_clip)" in lines[0]
    assert lines[1] == "1 slower, 0 faster, 0 too noisy to tell, 39 same"
    assert len(lines_of(compare([run(0)], [run(1)]), everything=True)) == ROWS + 2
    assert lines[2].startswith("One run before and one after")
    assert len(lines_of(compare([run(0), run(1)], [run(2), run(3)]), everything=True)) == ROWS + 1
