"""The figures of a benchmark report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from clipfast.benchmark.results import DENSE, OURS, Run
from clipfast.benchmark.summary import Line, best_rival, does_it_all
from clipfast.visualize.figures import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, add_legend, new_figure

_RIVALS = [ORANGE, PURPLE, GREY, "#c2a21b", "#c9506b", "#4aa3a8", "#8a6d4b", "#6f7fb0"]
_MARKERS = "sD^vPX*<"


def plot_roofline(run: Run) -> Figure | None:
    """Draw what was reached over operations a byte, below the machine's two limits; None without such rows.

    A point of clipfast's for each row that names operations and bytes, and one of the fastest rival.
    """
    rows = [row for row in run.rows if row.flops and row.bytes and OURS in row.sides]
    if not rows:
        return None
    figure, axes = new_figure(5.0, 3.8)
    ax: Axes = axes[0, 0]
    intensity = [row.flops / row.bytes for row in rows]
    x = np.geomspace(min(intensity) / 2, max(max(intensity), 100.0) * 2, 200)
    for style, (dtype, rate) in zip(("-", "--", ":"), run.limits.product_tflop_per_s.items(), strict=False):
        roof = np.minimum(rate, x * run.limits.copy_gb_per_s / 1e3)
        ax.plot(x, roof, style, color=INK, linewidth=1.2, label=f"limit, {dtype}")
    for label, colour, marker, pick in (
        ("fastest rival", ORANGE, "s", lambda row: found.rival if (found := best_rival(row)) else None),
        # the side that does all of a row's operations, where there is one
        (
            "clipfast",
            BLUE,
            "o",
            lambda row: next((s for s in (DENSE, OURS) if s in row.sides and does_it_all(row, s)), None),
        ),
    ):
        points = [(row.flops / row.bytes, row.flops / row.sides[s].seconds / 1e12) for row in rows if (s := pick(row))]
        if points:
            ax.plot(*zip(*points, strict=True), marker, color=colour, markersize=4.5, alpha=0.8, label=label)
    ax.set_xscale("log")
    ax.set_yscale("log")
    _plain_ticks(ax.xaxis)
    _plain_ticks(ax.yaxis)
    ax.set_xlabel("operations a byte")
    ax.set_ylabel("10¹² operations a second")
    add_legend(ax, loc="lower right", fontsize=8)
    return figure


def plot_lines(lines: Sequence[Line]) -> Figure:
    """Draw the sides of a series on two logarithmic axes, each with its exponent in the legend.

    Args:
        lines: Of one series and one figure, one at least.
    """
    figure, axes = new_figure(5.0, 3.6 + 0.09 * len(lines))
    ax: Axes = axes[0, 0]
    memory = lines[0].what == "memory"
    rivals = 0
    for line in lines:
        if line.side.startswith(OURS):
            colour, marker, width = (GREEN if line.side == DENSE else BLUE), "o", 2.0
        else:
            colour, marker, width = _RIVALS[rivals % 8], _MARKERS[rivals % 8], 1.2
            rivals += 1
        values = [value / 1e6 if memory else value * 1e3 for value in line.values]
        label = f"{line.side}: {line.slope:.2f}"
        ax.plot(line.at, values, marker=marker, color=colour, linewidth=width, markersize=4.5, label=label)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    _plain_ticks(ax.yaxis)
    ticks = sorted({at for line in lines for at in line.at})
    ax.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    ax.minorticks_off()
    ax.set_xlabel({"batch": "batch", "tokens": "tokens"}.get(lines[0].axis, lines[0].axis))
    ax.set_ylabel("peak memory, MB" if memory else "time, ms")
    law = f" (theory: {lines[0].law:g})" if lines[0].law is not None else ""
    add_legend(
        figure,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        title=f"exponent{law}",
        title_fontsize=8,
        handlelength=1.6,
    )
    return figure


def _plain_ticks(axis: Axis) -> None:
    """Write a logarithmic axis's ticks as numbers: as powers they would be formulas, which our style does not set."""
    low, high = axis.get_view_interval()
    # an axis that is shorter than two powers of ten has ticks between them
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
