"""How far tuning is, and what became of it, for a reader."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console, Group
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from clipfast.console import tell
from clipfast.files import short
from clipfast.ops import tuned
from clipfast.progress import Bar
from clipfast.tuning.run import Report, about


class TuningProgress:
    """A progress bar with what is being measured; in a file or a pipe, a plain line now and then.

    Use it as a context manager, and as :func:`clipfast.tune`'s ``progress``.

    Args:
        console: Where to write.
        seconds_between_lines: How often a plain line is written at most.
    """

    def __init__(self, console: Console, *, seconds_between_lines: float = 10.0) -> None:
        self._console, self._seconds_between_lines = console, seconds_between_lines
        self._last_line = -float("inf")
        self._bar = Bar(
            TextColumn("tuning"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}"),
            console=console,
            # no thread that draws beside what is being timed
            auto_refresh=False,
        )

    def __enter__(self) -> TuningProgress:
        self._task = self._bar.add_task("tuning", total=None, what="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, done: int, total: int, what: str) -> None:
        """Show that so much of the whole is done, and what is next."""
        self._bar.update(self._task, completed=done, total=total, what=what, refresh=True)
        now = time.monotonic()
        if not self._bar.draws and now - self._last_line >= self._seconds_between_lines:
            self._last_line = now
            tell(self._console, f"tuning {100 * done // max(total, 1)}% · {what}")


def render(report: Report) -> Group:
    """Return a table of what changed and why, what stays, and where it was written."""
    parts: list[Table | Text] = []
    if report.changes:
        table = Table(title="what changes", title_justify="left")
        for column in ("op", "calls", "so far", "from now on", "why"):
            table.add_column(column, overflow="fold")
        for line in report.changes:
            before, after = (_timed(name, line.seconds) for name in (line.verdict.rule, line.verdict.backend))
            table.add_row(line.op, line.key, before, after, line.verdict.why)
        parts.append(table)
    stays = [line for line in report.lines if not line.changed]
    if stays:
        table = Table(title="what stays as the rule has it", title_justify="left")
        for column in ("op", "calls", "serves", "beside"):
            table.add_column(column, overflow="fold")
        for line in stays:
            table.add_row(line.op, line.key, _timed(line.verdict.backend, line.seconds), line.verdict.why)
        parts.append(table)
    return Group(*parts, Text("\n".join(_closing(report))))


def _timed(name: str, seconds: dict[str, float]) -> str:
    return f"{name}, {about(seconds[name])}" if name in seconds else name


def _closing(report: Report) -> list[str]:
    lines = [f"wrong: {text}" for text in report.wrong]
    if report.interrupted:
        lines.append(
            "interrupted: what was done by then is kept, but changes that no whole tower has confirmed are not"
        )
    if report.left_out:
        lines.append(
            f"no time was left for {report.left_out} calls, which stay as the rule has them: --seconds gives more"
        )
    count = len(report.changes)
    summary = f"{count} of {len(report.lines)} kinds of calls change" if report.lines else "nothing was measured"
    lines.append(f"{summary}; {report.device}, {report.seconds:.0f} s")
    if report.path is not None:
        lines.append(f"wrote {short(report.path)}")
    else:
        lines.append(f"NOT WRITTEN: {report.not_written}; give --output FILE, and set {tuned.VARIABLE}=FILE to use it")
    return lines
