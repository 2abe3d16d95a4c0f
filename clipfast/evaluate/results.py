"""What an evaluation came to: as a table for the terminal, as JSON, and as a line of CSV."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from clipfast.evaluate.classes import IMAGENET
from clipfast.evaluate.names import chance_name, is_chance, words_of
from clipfast.outputs import write_results


@dataclass(frozen=True)
class Evaluation:
    """What a model came to on some data.

    Attributes:
        task: "zero-shot", "retrieval" or "linear-probe".
        metrics: By name, which is an identifier; shares in [0, 1].
        counts: What was measured: pictures, texts, classes.
        settings: What else the figures depend on.
        skipped: Why a picture or pair could not be read, by its name.
    """

    task: str
    metrics: dict[str, float]
    counts: dict[str, int]
    settings: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """What JSON holds of it."""
        return {
            "task": self.task,
            "metrics": self.metrics,
            "counts": self.counts,
            "settings": self.settings,
            "skipped": self.skipped,
        }

    def to_row(self) -> dict[str, Any]:
        """What a line of CSV holds of it: no lists, and of what was skipped the number."""
        settings = {name: value for name, value in self.settings.items() if not isinstance(value, list | dict)}
        return {"task": self.task} | self.counts | {"skipped": len(self.skipped)} | self.metrics | settings


def metrics_table(evaluation: Evaluation) -> Table:
    """Set an evaluation as a table for the terminal: each measure, and chance where it is known."""
    counts = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in evaluation.counts.items())
    table = Table("measure", "result", "chance", title=f"{evaluation.task}: {counts}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    metrics = evaluation.metrics
    for name, value in metrics.items():
        if not is_chance(name):
            chance = metrics.get(chance_name(name) or "")
            table.add_row(words_of(name), f"{value:.4f}", "" if chance is None else f"{chance:.4f}")
    table.caption = _about(evaluation.settings) or None
    return table


def _about(settings: dict[str, Any]) -> str:
    words = []
    if "C" in settings:
        stopped = "" if settings["converged"] else ", and the solver was stopped early"
        words.append(f"C = {settings['C']:.4g}{stopped}")
    if settings.get("class_names") == IMAGENET:
        words.append("OpenAI's names of ImageNet's classes")
    if "templates" in settings:
        words.append(f"{len(settings['templates'])} templates")
    if "prompts" in settings:
        words.append(f"{settings['prompt_count']} prompts of {settings['prompts']}")
    return ", ".join(words)


def write_evaluation(evaluation: Evaluation, path: Path, **about: object) -> None:
    """Write an evaluation, and what else it is about, as JSON or, to a ``.csv`` file, as a line below a header.

    Raises:
        OSError: The file cannot be written.
        ValueError: Its name ends otherwise.
    """
    write_results(path, about | evaluation.to_dict(), [about | evaluation.to_row()])
