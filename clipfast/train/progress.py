"""What a training run says of itself while it runs."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from clipfast.console import tell
from clipfast.progress import Bar, in_words
from clipfast.train.engine import StepRecord


class TrainingProgress:
    """A progress bar with loss, samples a second and time left; in a file or a pipe, a plain line now and then.

    Use it as a context manager, and :meth:`update` as :func:`clipfast.train.engine.train`'s ``on_step``.

    Args:
        steps: Of the whole run.
        console: Where to write.
        first: Steps taken before, by a run that this one goes on with.
        seconds_between_lines: How often a plain line is written at most; the first and last steps always are.
    """

    def __init__(self, steps: int, console: Console, *, first: int = 0, seconds_between_lines: float = 10.0) -> None:
        self.steps = steps
        self.first = first
        self.console = console
        self.seconds_between_lines = seconds_between_lines
        self._last_line = -float("inf")
        self._bar = Bar(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[words]} ·"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
        )

    def __enter__(self) -> TrainingProgress:
        self._task = self._bar.add_task("training", total=self.steps, completed=self.first, words="")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, record: StepRecord) -> None:
        """Show one more step."""
        words = f"loss {record.loss:.3f} · {record.samples_per_second:.0f} samples/s"
        if record.logit_bias is not None:
            words += f" · scale {record.logit_scale:.1f}, bias {record.logit_bias:.1f}"
        if record.data_wait >= 0.05:
            words += f" · {record.data_wait:.0%} waiting for data"
        if record.memory:
            words += f" · {record.memory / 1e9:.1f} GB"
        if record.skipped:
            words += f" · {record.skipped} skipped"
        self._bar.update(self._task, completed=record.step, words=words)
        if self._bar.draws:
            return
        now = time.monotonic()
        if record.step == self.steps or now - self._last_line >= self.seconds_between_lines:
            self._last_line = now
            left = (self.steps - record.step) * record.seconds / (record.step - self.first)
            tell(self.console, f"step {record.step}/{self.steps} · {words} · {in_words(left)} left")
