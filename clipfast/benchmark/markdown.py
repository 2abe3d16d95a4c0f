"""A run in Markdown: the parts of the README and of docs/benchmarks.md that ``clipfast-bench readme`` writes."""

from __future__ import annotations

from html import escape
from pathlib import Path

from clipfast.benchmark.chart import THEMES, chart_svg, chart_words
from clipfast.benchmark.front_page import (
    LIBRARIES,
    Comparison,
    accelerated,
    comparison_of,
    comparisons,
    joined,
    short_dtypes,
    side_text,
    where_text,
)
from clipfast.benchmark.results import DENSE, OURS, Row, Run
from clipfast.benchmark.summary import (
    OPS,
    best_rival,
    bytes_text,
    machine_text,
    ops_of,
    own_operator,
    ratio_text,
    shortcut_gain,
    time_text,
)

TABLE_PAGE, IMAGES = "docs/benchmarks.md", "docs/images"
"""Where a clone has the table of all rows and the charts, beside its README."""


def regenerated(run: Run, readme: Path) -> dict[Path, str]:
    """Return all that a README says of a run, by file: its parts, the table of all rows, and the chart, light and dark.

    Args:
        run: The run.
        readme: A clone's README; the other files are found beside it.

    Raises:
        ValueError: A mark is missing, or the run lacks what the README's first sentence is made of.
        OSError: A page cannot be read.
    """
    page, parts = readme.read_text(encoding="utf-8"), {"headline": headline, "accelerate": effect, "table": short_table}
    for name, write in parts.items():
        page = update_section(page, name, write(run))
    every = readme.parent / TABLE_PAGE
    files = {readme: page, every: update_section(every.read_text(encoding="utf-8"), "rows", markdown_table(run))}
    found = comparisons(run)
    return files | {readme.parent / _image(name): chart_svg(found, theme) for name, theme in THEMES.items()}


def update_section(text: str, name: str, content: str) -> str:
    """Return a page's text with other content between the two marks of a part.

    Raises:
        ValueError: A mark is missing, or they stand in the wrong order.
    """
    begin, end = marks(name)
    for mark in (begin, end):
        if text.count(mark) != 1:
            raise ValueError(f"expected the line {mark} once, got it {text.count(mark)} times")
    before, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"expected {begin} before {end}")
    return f"{before}{begin}\n{content}{end}{rest.split(end)[1]}"


def marks(name: str) -> tuple[str, str]:
    """Return the lines between which a part stands."""
    return f"<!-- benchmarks, {name}: begin -->", f"<!-- benchmarks, {name}: end -->"


# --- the README ---------------------------------------------------------------------------------------------


def headline(run: Run) -> str:
    """Return the first sentence, with three figures against open_clip, and the chart."""
    prompts, training, memory = (comparison_of(run, key, "open_clip") for key in ("prompts", "training", "loss memory"))
    times = [ratio_text(c.ratios["open_clip"]).removesuffix("\u00a0×") for c in (prompts, training)]
    pairs = memory.what.split(", ")[1]
    sentence = (
        f"Your CLIP, with the same weights and the same numbers: zero-shot prompts **{times[0]} times** as fast as "
        f"with open_clip, a training step **{times[1]} times** as fast, and the contrastive loss of {pairs} in "
        f"**{memory.ours}** instead of **{memory.theirs['open_clip']}** ({machine_text(run)})."
    )
    words = escape(chart_words(comparisons(run)))
    picture = (
        f'<picture>\n  <source media="(prefers-color-scheme: dark)" srcset="{_image("dark")}">\n'
        f'  <img src="{_image("light")}" alt="{words}">\n</picture>'
    )
    return f"{sentence}\n\n{picture}\n"


def effect(run: Run) -> str:
    """Return what one line does to a library's own model; nothing where that was not measured."""
    rows = accelerated(run)
    if not rows:
        return ""
    told = []
    for library, row in rows.items():
        before, now = (time_text(row.sides[name].seconds) for name in (library, OURS))
        times = joined([before, now]).replace(", ", " → ")
        told.append(f"{row.label.split()[0]} {times} (**{ratio_text(row.ratio(library))}**)")
    what = short_dtypes(next(iter(rows.values())).label.partition(", ")[2])
    return f"{what[:1].upper()}{what[1:]}: {', '.join(told)}.\n"


def short_table(run: Run) -> str:
    """Return the rows that users decide by."""
    found = comparisons(run)
    models = ", ".join(dict.fromkeys(c.model for c in found if c.model))
    lines = [
        f"{where_text(run)}; {models}. The others' time, or memory, over clipfast's: above 1, clipfast is ahead.",
        "",
        f"| | clipfast | {' | '.join(LIBRARIES)} | fastest rival |",
        f"|---|--:|{'--:|' * len(LIBRARIES)}---|",
    ]
    return "\n".join([*lines, *map(_short_line, found)]) + "\n"


def _short_line(comparison: Comparison) -> str:
    best = "–"
    if comparison.best is not None:
        ratio = comparison.ratios[comparison.best]
        worse = "" if ratio >= 1 else ": clipfast needs more" if "memory" in comparison.key else ": clipfast is slower"
        best = f"{ratio_text(ratio)} {_escaped(side_text(comparison.best))}".replace(" ", "&nbsp;") + worse
    columns = [ratio_text(comparison.ratios[name]) if name in comparison.ratios else "–" for name in LIBRARIES]
    # a line each, however narrow the page is
    cells = [cell.replace(" ", "&nbsp;") for cell in (comparison.what, comparison.ours, *columns)]
    return f"| {' | '.join([*cells, best])} |"


def _image(theme: str) -> str:
    return f"{IMAGES}/speed-{theme}.svg"


# --- all rows -----------------------------------------------------------------------------------------------


def markdown_table(run: Run) -> str:
    """Return a line a row: clipfast's time, and the fastest rival's over it, dense and with exact shortcuts."""
    lines = [
        f"{where_text(run)}, the {run.scale} set{'' if run.complete else ', a part of it'}. The fastest "
        "rival of each row, and its time over clipfast's in the same rounds: above 1, clipfast is faster. A rival that "
        "is the very operator of PyTorch that clipfast calls there is called *the same operator*.",
        "",
        "| | clipfast | peak memory | fastest rival | its time over ours | over ours with every token computed |",
        "|---|--:|--:|---|--:|--:|",
    ]
    for op in ops_of(run):
        rows = [row for row in run.rows if row.op == op and OURS in row.sides]
        if rows:
            lines.append(f"| **{OPS.get(op, op)}** | | | | | |")
        lines += [_line(row) for row in rows]
    return "\n".join(lines) + "\n"


def is_same_operator(row: Row) -> bool:
    """Tell whether the fastest rival calls the very operator of PyTorch that serves clipfast's call."""
    own, best = own_operator(row), best_rival(row)
    # attention that is written out is another one than SDPA
    return own is not None and best is not None and best.rival.startswith("SDPA" if "attention" in own else "PyTorch")


def _line(row: Row) -> str:
    ours, best = row.sides[OURS], best_rival(row)
    dense = best_rival(row, DENSE) if shortcut_gain(row) is not None else None
    cells = [
        _escaped(row.name),
        time_text(ours.seconds),
        bytes_text(ours.peak_bytes),
        _escaped(best.rival) + (", the same operator" if is_same_operator(row) else "") if best else "none was there",
        f"{best.ratio:.2f} ×" if best else "–",
        f"{dense.ratio:.2f} ×" if dense else "",
    ]
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
