"""Loss, logit scale and speed over a training run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from clipfast.visualize.figures import BLUE, GREY, ORANGE, PURPLE, new_figure


def read_log(path: Path) -> list[dict[str, float]]:
    """Read the JSON lines that training writes; a last line that is cut off is left out.

    Raises:
        ValueError: Another line is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # the run was killed while it wrote
            raise ValueError(f"{path}: line {number} is {line[:60]!r}, expected JSON") from error
    return records


def plot_training_curves(history: Sequence[Mapping[str, float]], chance_loss: float | None = None) -> Figure:
    """Plot loss, logit scale and samples a second over the steps of a run.

    Args:
        history: For each step a record with ``step``, ``loss``, ``logit_scale`` and ``samples_per_second``, as
            training logs them.
        chance_loss: The loss of a model that cannot tell pairs apart, ``ln(batch size)``, drawn as a level.

    Raises:
        ValueError: ``history`` is empty.
    """
    if not history:
        raise ValueError("history: got no records, expected at least one step")
    columns = {name: np.array([record[name] for record in history]) for name in history[0]}
    steps = columns["step"]
    figure, panels = new_figure(5.0, 5.2, rows=3, sharex=True, height_ratios=(3, 1.3, 1.3))
    loss_axes, scale_axes, speed_axes = panels[:, 0]

    loss_axes.plot(steps, columns["loss"], color=BLUE, alpha=0.35, linewidth=1)
    loss_axes.plot(steps, _smooth(columns["loss"]), color=BLUE, linewidth=2)
    if chance_loss is not None:
        loss_axes.axhline(chance_loss, color=GREY, linestyle="--", linewidth=1)
        loss_axes.annotate(
            f"guessing: {chance_loss:.2f}", (steps[-1], chance_loss), ha="right", va="bottom", color=GREY
        )
    loss_axes.set_ylim(bottom=0)
    loss_axes.set_ylabel("loss")
    scale_axes.plot(steps, columns["logit_scale"], color=ORANGE, linewidth=2)
    scale_axes.set_ylabel("logit scale")
    speed_axes.plot(steps, columns["samples_per_second"], color=PURPLE, linewidth=1)
    speed_axes.set_ylim(bottom=0)
    speed_axes.set_ylabel("samples/s")
    speed_axes.set_xlabel("step")
    figure.align_ylabels()
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving mean over a tenth of the run: unlike a running average it does not lag behind a fall."""
    window = np.ones(2 * (len(values) // 20) + 1)
    return np.convolve(values, window, mode="same") / np.convolve(np.ones(len(values)), window, mode="same")
