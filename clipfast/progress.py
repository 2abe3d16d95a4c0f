"""How far a pass over many rows is: a bar on a terminal, and elsewhere a line a minute."""

from __future__ import annotations

import contextlib
import os
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from clipfast.console import tell
from clipfast.notices import drawing_on, is_terminal

if TYPE_CHECKING:
    from typing_extensions import Self


def draws(console: Console | None) -> bool:
    """Whether a bar can be drawn: on a terminal that moves its cursor."""
    if console is None or not console.is_terminal or console.is_dumb_terminal:
        return False
    # with these rich takes a file for a terminal, which colours may be meant for but no cursor
    forced = any(os.environ.get(name) for name in ("FORCE_COLOR", "TTY_COMPATIBLE"))
    return not forced or is_terminal(console.file)


def in_words(seconds: float) -> str:
    """Say a time: ``8 s``, ``3 min 20 s``, ``2 h 5 min`` or ``3 d 4 h``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    for size, part, name, part_name in ((86_400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // part} {part_name}"
    raise AssertionError(whole)


def rate_in_words(rate: float) -> str:
    """Say a rate with three digits at least where it is small: ``1204 a second``, ``7.3 a second``."""
    return f"{rate:.0f} a second" if rate >= 10 else f"{rate:.2g} a second"


class Bar(Progress):
    """rich's bars on a terminal, below notices; nothing where they cannot be drawn, so that lines take their place.

    Attributes:
        draws: Whether they are drawn.
    """

    def __init__(self, *columns: ProgressColumn, console: Console | None, **options: Any) -> None:
        self.draws = draws(console)
        self._notices_above = contextlib.ExitStack()
        super().__init__(*columns, console=console, disable=not self.draws, **options)

    def start(self) -> None:
        """Draw; a second call changes nothing."""
        if self.draws and not self.live.is_started:
            self._notices_above.enter_context(drawing_on(self.console))
            super().start()

    def stop(self) -> None:
        """End drawing, if it began."""
        if self.live.is_started:
            super().stop()
        self._notices_above.close()


class ProgressLines:
    """How much is done: a bar on a terminal; in a file or a pipe, a plain line now and then.

    Use it as a context manager.

    Args:
        label: What is being done.
        total: How many steps or rows there are.
        console: Where to write; None keeps silent.
        done: How many were done before.
        seconds_between_lines: How often a plain line is written at most.
        words: What the bar says before the first call of :meth:`show`.
        line: What plain lines begin with; by default the label.
        at_once: Whether a bar is drawn before the first call of :meth:`show`, which may never come where nothing is to
            be done.
    """

    def __init__(
        self,
        label: str,
        total: int,
        console: Console | None,
        *,
        done: int = 0,
        seconds_between_lines: float,
        words: str = "",
        line: str | None = None,
        at_once: bool = True,
    ) -> None:
        self._label, self._line, self._words = label, line or label, words
        self._total, self._done, self._console = total, done, console
        self._seconds_between_lines, self._at_once = seconds_between_lines, at_once
        self._last_line = -float("inf")
        self._bar = Bar(
            TextColumn(label, markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]} ·", markup=False),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def __enter__(self) -> Self:
        self._task = self._bar.add_task(self._label, total=self._total, completed=self._done, words=self._words)
        if self._at_once:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, done: int, words: str) -> None:
        """Draw that so many are done, and what is to be said of it."""
        self._bar.start()
        self._done = done
        self._bar.update(self._task, completed=done, words=words)

    def is_due(self) -> bool:
        """Return whether a plain line may be written now; the next is due a while after that."""
        now = time.monotonic()
        due = now - self._last_line >= self._seconds_between_lines
        self._last_line = now if due else self._last_line
        return due

    def write(self, words: str, ending: str) -> None:
        """Write a plain line, unless a bar is drawn."""
        if self._console is not None and not self._bar.draws:
            tell(self._console, f"{self._line} {self._done}/{self._total} · {words} · {ending}")


class RowProgress(ProgressLines):
    """Rows done, rows a second and time left; without a terminal a plain line a minute.

    Use it as a context manager, and call it with the number of rows that are done.

    Args:
        label: What is being done.
        total: How many rows there are.
        console: Where to write; None keeps silent.
        done: How many were done before; they do not count for the rate.
        seconds_between_lines: How often a plain line is written at most. What takes longer ends with one, too.
        at_once: Whether a bar is drawn before the first call, which may never come where nothing is to be done.
    """

    def __init__(
        self,
        label: str,
        total: int,
        console: Console | None,
        *,
        done: int = 0,
        seconds_between_lines: float = 60.0,
        at_once: bool = True,
    ) -> None:
        super().__init__(
            label,
            total,
            console,
            done=done,
            seconds_between_lines=seconds_between_lines,
            words=rate_in_words(0),
            at_once=at_once,
        )
        self._first = done

    def __enter__(self) -> Self:
        self._started = self._last_line = time.monotonic()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        took = time.monotonic() - self._started
        if kind is None and took >= self._seconds_between_lines:
            self.write(rate_in_words(self._rate(self._done, took)), f"took {in_words(took)}")

    def __call__(self, rows: int) -> None:
        """Count ``rows`` more."""
        done = self._done + rows
        rate = self._rate(done, time.monotonic() - self._started)
        self.show(done, rate_in_words(rate))
        if done < self._total and self.is_due():
            self.write(rate_in_words(rate), f"{in_words((self._total - done) / max(rate, 1e-9))} left")

    def _rate(self, done: int, took: float) -> float:
        return (done - self._first) / max(took, 1e-9)
