"""What all figures share: colours that read on white and on black, and the way into a web page."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import is_color_like, to_rgba
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from clipfast.files import write_atomically

BLUE, ORANGE, GREEN, PURPLE, GREY = "#3d85d0", "#e07b2e", "#2fa36b", "#9a6fd0", "#8a8f98"

# letters of 6 points in an inch
_LETTERS = 21

# Stand-ins that a web page swaps for its own colours, which follow the reader's light or dark mode.
INK, _RULE = "#010203", "#040506"
_STYLE = {
    "axes.edgecolor": _RULE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 10,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: it can be searched and takes the page's font
    "svg.hashsalt": "clipfast",  # the same figure gives the same file
    "text.color": INK,
    "text.parse_math": False,  # a caption with two dollars is no formula
    "xtick.color": INK,
    "ytick.color": INK,
}


def new_figure(
    width: float = 5.0, height: float = 3.2, rows: int = 1, columns: int = 1, **options: object
) -> tuple[Figure, np.ndarray]:
    """Make a figure in the house's style, without touching matplotlib's global state.

    Args:
        width: inches. A figure of 5 inches keeps its labels legible on a telephone.
        height: inches.
        rows: of axes.
        columns: of axes.
        options: for :meth:`matplotlib.figure.Figure.subplots`.

    Returns:
        The figure and its axes, ``[rows, columns]``.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def add_legend(owner: Axes | Figure, **options: object) -> None:
    """Add a legend in the house's style: matplotlib reads a legend's style when it is made, not from its figure.

    Args:
        owner: the axes or the figure that it explains.
        options: for its ``legend``.
    """
    with matplotlib.rc_context(_STYLE):
        owner.legend(**options)


def add_colour_bar(figure: Figure, axes: Axes, scale: ScalarMappable, label: str, *, open_ended: bool) -> None:
    """Say what colours mean, in the house's style.

    Args:
        figure: Made by :func:`new_figure`.
        axes: Whose colours they are.
        scale: The colours and their range.
        label: What they stand for.
        open_ended: Whether values beyond the range take the colours of its ends.
    """
    with matplotlib.rc_context(_STYLE):
        extend = "both" if open_ended else "neither"
        bar = figure.colorbar(scale, ax=axes, extend=extend, fraction=0.04, pad=0.02, aspect=14)
        bar.ax.tick_params(labelsize=7, length=2)
        bar.set_label(label, fontsize=7)
        bar.outline.set_visible(False)
        bar.ax.grid(visible=False)


def hide_frame(axes: Axes) -> None:
    """Leave only what is drawn: no ticks, no grid, no border."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def figure_svg(figure: Figure, label: str) -> str:
    """An ``<svg>`` element to put into a page, coloured by the page's ``currentColor`` and ``--rule``.

    Args:
        figure: made by :func:`new_figure`.
        label: what it shows, for those who do not see it.
    """
    file = io.StringIO()
    _leave_dollars(figure)
    with matplotlib.rc_context(_STYLE):
        figure.savefig(file, format="svg", dpi=150, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(_RULE, "var(--rule)")
    return svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def save_png(figure: Figure, path: Path, *, dark: bool = False, dpi: int = 160, about: str = "") -> None:
    """Write a figure as PNG on a page of its own: white, or nearly black.

    Args:
        figure: made by :func:`new_figure`; drawn in the page's colours from then on.
        path: replaced at once or not at all.
        dark: which page.
        dpi: pixels an inch.
        about: what it is of, written below it and into the file's metadata: a PNG goes its own ways.
    """
    page, ink, rule = ("#14171c", "#e8eaee", "#3a414d") if dark else ("#ffffff", "#1d2129", "#d9dde3")
    swap = {to_rgba(INK): ink, to_rgba(_RULE): rule}

    def recolour(get: Callable[[], object], put: Callable[[str], object]) -> None:
        colour = get()
        if is_color_like(colour) and to_rgba(colour) in swap:
            put(swap[to_rgba(colour)])

    if about:
        with matplotlib.rc_context(_STYLE):
            words = textwrap.fill(about, max(20, int(figure.get_figwidth() * _LETTERS)))
            figure.supxlabel(words, x=0.01, ha="left", fontsize=6, color=GREY)
    _leave_dollars(figure)
    for part in figure.findobj():
        for name in ("color", "edgecolor", "facecolor", "markeredgecolor"):
            get, put = getattr(part, f"get_{name}", None), getattr(part, f"set_{name}", None)
            if get is not None and put is not None:
                recolour(get, put)
    with matplotlib.rc_context(_STYLE):
        metadata = {"Description": about} if about else None
        write_atomically(
            path, lambda file: figure.savefig(file, format="png", dpi=dpi, facecolor=page, metadata=metadata)
        )


def _leave_dollars(figure: Figure) -> None:
    """Read no text of a figure as a formula; texts that were added outside of the style would be."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def picture_uri(picture: np.ndarray) -> str:
    """A ``data:`` address that holds a picture, uint8 ``[H, W, 3]``, as PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
