"""How far a pass over many rows is."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RowProgress:
    """A progress bar with rows a second and time left; in a file or a pipe, a plain line now and then.

    Use it as a context manager, and call it with the number of rows that are done.

    Args:
        label: What is being done.
        total: How many rows there are.
        console: Where to write; None keeps silent.
        done: How many were done before.
        seconds_between_lines: How often a plain line is written at most.
    """

    def __init__(
        self, label: str, total: int, console: Console | None, *, done: int = 0, seconds_between_lines: float = 10.0
    ) -> None:
        self._label, self._total, self._console, self._first = label, total, console, done
        self._seconds_between_lines = seconds_between_lines
        self._done = done
        self._bar = Progress(
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} a second ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=console is None or not console.is_terminal,
        )

    def __enter__(self) -> RowProgress:
        self._started = self._last_line = time.monotonic()
        self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, rate=0.0)
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, rows: int) -> None:
        """Count ``rows`` more."""
        self._done += rows
        now = time.monotonic()
        rate = (self._done - self._first) / max(now - self._started, 1e-9)
        self._bar.update(self._task, completed=self._done, rate=rate)
        if self._console is None or self._console.is_terminal:
            return
        if now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            left = (self._total - self._done) / max(rate, 1e-9)
            line = f"{self._label} {self._done}/{self._total} · {rate:.0f} a second · {left:.0f} s left"
            self._console.print(line, highlight=False)
