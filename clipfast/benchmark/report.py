"""The report of a benchmark run: one HTML file that needs nothing else."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path

from clipfast.benchmark.bars import bars_html, group_words, legend_html, scale_of, style
from clipfast.benchmark.figures import plot_lines, plot_roofline
from clipfast.benchmark.groups import groups_of
from clipfast.benchmark.results import DENSE, OURS, Row, Run
from clipfast.benchmark.summary import (
    best_rival,
    bytes_text,
    does_it_all,
    lines_of,
    machine_text,
    number_text,
    rate,
    series_of,
    share_of_limit,
    shortcut_gain,
    speed_ups,
    time_text,
)
from clipfast.benchmark.tiles import tiles_of
from clipfast.visualize.report import Report

_STYLE = """<style>
body { max-width: 68rem; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.tile b { font-size: 1.5rem; white-space: nowrap; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.scroll td:first-child { min-width: 11rem; overflow-wrap: normal; }
.scroll th, .scroll td { padding-right: .6rem; }
details .scroll td:nth-child(2), details .scroll th:nth-child(2) { min-width: 8rem; text-align: left;
  white-space: normal; overflow-wrap: normal; }
.scroll table { font-size: .8rem; margin-top: .5rem; }
</style>"""

_HOW = (
    "Every side was compared with a float64 oracle before it was timed. Sides then ran in turn, a round each, and "
    "ratios are of times in the same round: the median, with the quartiles of the rounds. The limit is what a large "
    "copy and a large matrix product of PyTorch's reached in the same run; what stays in the cache, or multiplies "
    "better, may pass 100%. It is not given for sides that leave out what cannot change the result: they do less. "
    "Memory is the most that a call took beyond what was there; saved is what the graph keeps for the backward pass. "
    "On a CPU the system counts pages, and what is below a megabyte is lost in the counting. "
    "The error is max|result − oracle| over max|oracle|."
)


def report_html(run: Run) -> str:
    """Return the report of a run; the same run gives the same text."""
    device = "an NVIDIA GPU" if run.device == "cuda" else "the CPU: no GPU was there"
    report = Report(
        f"clipfast on {machine_text(run)}",
        f"Measured on {run.date} at commit {run.commit}, the {run.scale} set"
        f"{'' if run.complete else ', a part of it'}, on {device}. PyTorch {run.details.get('torch', '?')}.",
    )
    scale = scale_of(run)
    report.add_html(_STYLE + style(scale))
    if tiles := tiles_of(run):
        report.add_tiles(tiles)
    report.add_html(legend_html(run))
    report.add_html("<details><summary>How this was measured</summary>")
    report.add_text(_HOW)
    report.add_html("</details>")
    for group in groups_of(run):
        report.add_section(group.heading, group_words(group))
        report.add_html(bars_html(group, scale, run.device))
        report.add_html("<details><summary>All figures</summary>")
        rows = group.rows + group.same
        report.add_table(
            _HEADER, [cells for row in rows for cells in _cells(row)], label=f"{group.heading}: all figures"
        )
        report.add_html("</details>")
    _add_shortcuts(report, run)
    _add_roofline(report, run)
    _add_scaling(report, run)
    versions = ", ".join(f"{name} {version}" for name, version in run.details.items())
    return report.html(f"clipfast at {run.commit}, {run.date}. {run.machine}: {versions}.")


def write_report(run: Run, path: Path) -> None:
    """Write the report of a run as one HTML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(run), encoding="utf-8")


def _add_roofline(report: Report, run: Run) -> None:
    limits = [f"a copy {run.limits.copy_gb_per_s:,.0f} GB/s, read and written"]
    for dtype, tera in run.limits.product_tflop_per_s.items():
        speed = f"{tera:.3g} TFLOP/s" if tera >= 1 else f"{1000 * tera:.0f} GFLOP/s"
        limits.append(f"a large matrix product {speed} in {dtype}")
    report.add_section("Roofline", f"What this machine reached in the same run: {'; '.join(limits)}.")
    roofline = plot_roofline(run)
    if roofline is not None:
        report.add_text(
            "What each row reached, over the operations that a computation has for each byte that it must move. Left "
            "of the bend memory is the limit, right of it the matrix product."
        )
        report.add_figure(roofline, "Operations a second over operations a byte, with the machine's limits")


_HEADER = (
    "what", "side", "device time", "host time", "× clipfast’s", "quartiles", "GB/s", "TFLOP/s", "of the limit", "peak",
    "saved", "error",
)  # fmt: skip


def _cells(row: Row) -> list[list[str]]:
    ratios = {found.rival: found for found in speed_ups(row)} if OURS in row.sides else {}
    rows = []
    for name, side in row.sides.items():
        found = ratios.get(name)
        times = row.ratio(name) if OURS in row.sides else None
        gigabytes, tera = rate(row.bytes, side), rate(row.flops, side) if does_it_all(row, name) else None
        rows.append(
            [
                row.name if not rows else "",
                name,
                time_text(side.seconds),
                time_text(statistics.median(side.host_s)),
                number_text(times, ".2f", " ×"),
                f"{found.low:.2f} to {found.high:.2f}" if found else "–",
                number_text(None if gigabytes is None else gigabytes / 1e9, ".1f"),
                number_text(None if tera is None else tera / 1e12, ".3g"),
                number_text(share_of_limit(row, name), ".0%"),
                bytes_text(side.peak_bytes),
                bytes_text(side.saved_bytes),
                number_text(side.error, ".1e"),
            ]
        )
    for name, reason in row.missing.items():
        rows.append([row.name if not rows else "", name, reason, *["–"] * (len(_HEADER) - 3)])
    return rows


def _add_shortcuts(report: Report, run: Run) -> None:
    rows = [(row, gain) for row in run.rows if (gain := shortcut_gain(row)) is not None]
    if not rows:
        return
    report.add_section(
        "Dense and with exact shortcuts",
        "What leaving out brings that cannot change the result: tokens behind the end of a caption, and all but one "
        "token of the last block.",
    )
    header = ("what", "every token", "with shortcuts", "gain", "fastest rival over dense", "over shortcuts")
    cells = []
    for row, gain in rows:
        over_dense, over_ours = best_rival(row, DENSE), best_rival(row)
        cells.append(
            [
                row.name,
                time_text(row.sides[DENSE].seconds),
                time_text(row.sides[OURS].seconds),
                f"{gain:.2f} ×",
                number_text(over_dense and over_dense.ratio, ".2f", " ×"),
                number_text(over_ours and over_ours.ratio, ".2f", " ×"),
            ]
        )
    report.add_table(header, cells, label="Dense and with exact shortcuts")


def _add_scaling(report: Report, run: Run) -> None:
    names = series_of(run)
    if not names:
        return
    report.add_section(
        "Scaling",
        "Time and memory over batch or tokens, on two logarithmic axes: the slope is the exponent, by least squares. "
        "Fixed costs bend the lines at small sizes, so that the exponent of the larger half stands beside that of all.",
    )
    header = ("series", "figure", "side", "points", "exponent", "of the larger half", "theory")
    table, figures = [], []
    for name in names:
        for what in ("time", "memory"):
            lines = lines_of(run, name, what)
            if not lines or (what == "memory" and lines[0].law is None):
                continue
            figures.append((f"{name}: {what}", plot_lines(lines)))
            table += [
                [
                    name,
                    what,
                    line.side,
                    str(len(line.at)),
                    number_text(line.slope, ".2f"),
                    number_text(line.upper_slope, ".2f"),
                    number_text(line.law, "g"),
                ]
                for line in lines
            ]
    for label, figure in figures:
        report.add_html(f"<h3>{escape(label)}</h3>")
        report.add_figure(figure, label)
    report.add_table(header, table, label="Exponents")
