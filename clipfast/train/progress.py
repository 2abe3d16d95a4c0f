"""What a training run says of itself while it runs."""

from __future__ import annotations

from rich.console import Console

from clipfast.progress import ProgressLines, in_words
from clipfast.train.engine import StepRecord


class TrainingProgress(ProgressLines):
    """A progress bar with loss, samples a second and time left; in a file or a pipe, a plain line now and then.

    Use it as a context manager, and :meth:`update` as :func:`clipfast.train.engine.train`'s ``on_step``.

    Args:
        steps: Of the whole run.
        console: Where to write.
        first: Steps taken before, by a run that this one goes on with.
        seconds_between_lines: How often a plain line is written at most; the first and last steps always are.
    """

    def __init__(self, steps: int, console: Console, *, first: int = 0, seconds_between_lines: float = 10.0) -> None:
        super().__init__(
            "training", steps, console, done=first, seconds_between_lines=seconds_between_lines, line="step"
        )
        self.steps, self.first = steps, first

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
        self.show(record.step, words)
        if self.is_due() or record.step == self.steps:
            left = (self.steps - record.step) * record.seconds / (record.step - self.first)
            self.write(words, f"{in_words(left)} left")
