from __future__ import annotations

import io

import pytest
from rich.console import Console

from clipfast.train.engine import StepRecord
from clipfast.train.progress import TrainingProgress


def records(steps: int) -> list[StepRecord]:
    return [StepRecord(i, 5.0 / i, 14.0, 1e-3, 2.0, 100.0 * i, 0.01, 0, 0, 2.0 * i) for i in range(1, steps + 1)]


def test_plain_lines_where_there_is_no_terminal():
    file = io.StringIO()
    with TrainingProgress(20, Console(file=file, width=100)) as progress:
        for record in records(20):
            progress.update(record)
    lines = file.getvalue().strip().splitlines()
    # within ten seconds: the first and the last step
    assert lines == [
        "step 1/20 · loss 5.000 · 100 samples/s · 38 s left",
        "step 20/20 · loss 0.250 · 2000 samples/s · 0 s left",
    ]


def test_a_line_now_and_then():
    file = io.StringIO()
    with TrainingProgress(5, Console(file=file, width=100), seconds_between_lines=0) as progress:
        for record in records(5):
            progress.update(record)
    assert len(file.getvalue().strip().splitlines()) == 5


def test_a_bar_in_a_terminal():
    file = io.StringIO()
    console = Console(file=file, width=120, force_terminal=True, legacy_windows=False)
    with TrainingProgress(3, console) as progress:
        for record in records(3):
            progress.update(record)
    shown = file.getvalue()
    for part in ("3/3", "loss 1.667", "300 samples/s"):
        assert part in shown
    assert "step 1/3" not in shown


def test_an_error_passes_through_and_closes_the_bar():
    progress = TrainingProgress(3, Console(file=io.StringIO(), force_terminal=True))

    def fail() -> None:
        with progress:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert progress._bar.live.is_started is False
