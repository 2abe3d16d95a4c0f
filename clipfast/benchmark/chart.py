"""The README's chart: comparisons as bars on a logarithmic axis, written as SVG, so that a run gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from clipfast.benchmark.front_page import LIBRARIES, Comparison, side_text
from clipfast.benchmark.summary import ratio_text

WIDTH = 560
_LEFT, _RIGHT, _TOP, _STEP = 176, 76, 38, 28
_FONT = "-apple-system, BlinkMacSystemFont, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


@dataclass(frozen=True)
class Theme:
    """The colours of a chart on one of GitHub's two pages.

    Attributes:
        ink: Of words.
        faint: Of what stands back: details, ticks.
        rule: Of lines.
        bar: Where clipfast is ahead.
        behind: Where it is not.
        marks: Of the libraries' marks, in the order of :data:`LIBRARIES`.
    """

    ink: str
    faint: str
    rule: str
    bar: str
    behind: str
    marks: tuple[str, str]


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d1d9e0", "#3d85d0", "#8a8f98", ("#c2560c", "#8250df")),
    "dark": Theme("#f0f6fc", "#9198a1", "#3d444d", "#3d85d0", "#8a8f98", ("#f0883e", "#bc8cff")),
}


def chart_svg(comparisons: Sequence[Comparison], theme: Theme) -> str:
    """Return a chart of how many times as much each rival takes.

    A bar goes from 1 × to the fastest rival, whose figure stands beside it; open_clip and transformers are marks.

    Args:
        comparisons: One at least.
        theme: Its colours.
    """
    every = [ratio for c in comparisons for ratio in c.ratios.values()]
    low, high = min(0.8, *every), max(2.0, *every)
    scale = (WIDTH - _LEFT - _RIGHT) / math.log(high / low)

    def x(ratio: float) -> float:
        return _LEFT + scale * math.log(ratio / low)

    bottom = _TOP + _STEP * len(comparisons)
    parts = [_legend(theme)]
    for tick in _TICKS:
        if low <= tick <= high:
            one = tick == 1
            parts.append(
                f'<path d="M{x(tick):.1f} {_TOP - 4}V{bottom}" stroke="{theme.ink if one else theme.rule}" '
                f'stroke-width="{1.5 if one else 1}"/>'
            )
            parts.append(_text(x(tick), bottom + 19, f"{tick:g} ×", theme.faint, 14, "middle"))
    for index, comparison in enumerate(comparisons):
        parts += _bar(comparison, _TOP + _STEP * (index + 0.5), x, theme)
    parts.append(_text(_LEFT - 10, bottom + 19, "clipfast's time, memory:", theme.faint, 13, "end"))
    height = bottom + 30
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="{_FONT}" role="img"><title>{escape(chart_words(comparisons))}</title>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def chart_words(comparisons: Sequence[Comparison]) -> str:
    """Return what a chart shows in words, for those who do not see it."""
    told = "; ".join(f"{c.title}: {_beside(c)}" for c in comparisons)
    return f"Time or memory of the others over clipfast's. {told}."


def _beside(comparison: Comparison) -> str:
    if comparison.best is None:
        return ", ".join(f"{name} {ratio_text(ratio)}" for name, ratio in comparison.ratios.items())
    return f"{side_text(comparison.best)} {ratio_text(comparison.ratios[comparison.best])}"


def _bar(comparison: Comparison, middle: float, x: Callable[[float], float], theme: Theme) -> list[str]:
    least = min(comparison.ratios.values())
    start, end = sorted((x(1.0), x(least)))
    parts = [
        _text(_LEFT - 10, middle + 5, comparison.title, theme.ink, 15, "end"),
        f'<rect x="{start:.1f}" y="{middle - 7:.1f}" width="{max(end - start, 1):.1f}" height="14" rx="2" '
        f'fill="{theme.bar if least > 1 else theme.behind}"/>',
    ]
    drawn = [library for library in LIBRARIES if library in comparison.ratios]
    parts += [_mark(library, x(comparison.ratios[library]), middle, theme) for library in drawn]
    beyond = max([x(1.0), x(least), *(x(comparison.ratios[library]) for library in drawn)])
    return [*parts, _text(beyond + 12, middle + 5, ratio_text(least), theme.ink, 15, weight=600)]


def _mark(library: str, x: float, y: float, theme: Theme) -> str:
    ring, diamond = theme.marks
    if library == LIBRARIES[0]:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="{ring}" stroke-width="2.5"/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z" fill="{diamond}"/>'


def _text(x: float, y: float, text: str, colour: str, size: int, anchor: str = "start", weight: int = 400) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{colour}">{escape(text)}</text>'
    )


def _legend(theme: Theme) -> str:
    return "".join(
        [
            f'<rect x="{_LEFT}" y="5" width="20" height="14" rx="2" fill="{theme.bar}"/>',
            _text(_LEFT + 26, 17, "fastest rival", theme.ink, 14),
            _mark(LIBRARIES[0], _LEFT + 132, 12, theme),
            _text(_LEFT + 144, 17, LIBRARIES[0], theme.ink, 14),
            _mark(LIBRARIES[1], _LEFT + 232, 12, theme),
            _text(_LEFT + 242, 17, LIBRARIES[1], theme.ink, 14),
        ]
    )
