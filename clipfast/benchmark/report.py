"""The report of a benchmark run: one HTML file that needs nothing else."""

from __future__ import annotations

import statistics
from html import escape
from pathlib import Path

from clipfast.benchmark.figures import plot_lines, plot_roofline
from clipfast.benchmark.results import DENSE, OURS, Row, Run
from clipfast.benchmark.summary import (
    OPS,
    best_rival,
    bytes_text,
    does_it_all,
    lines_of,
    machine_text,
    number_text,
    ops_of,
    rate,
    series_of,
    share_of_limit,
    shortcut_gain,
    speed_ups,
    time_text,
)
from clipfast.visualize.report import Report

_BARS = """<style>
.bars { margin: 1rem 0 1.5rem; max-width: 42rem; }
.bars h3 { font-size: .95rem; font-weight: 600; margin: 1rem 0 .3rem; }
.bar { display: grid; grid-template-columns: minmax(7.5rem, 12rem) 1fr 4.2rem; gap: .5rem; align-items: center;
  font-size: .82rem; line-height: 1.3; margin: .15rem 0; }
.bar .track { position: relative; height: .8rem; border-left: 1px solid var(--rule); }
.bar .track i { display: block; position: absolute; left: 0; top: 0; height: 100%; background: #3d85d0; }
.bar .track i.dense { background: #2fa36b; }
.bar .track u { position: absolute; top: -.15rem; bottom: -.15rem; border-left: 2px solid var(--ink); }
.bar b { font-weight: 600; font-variant-numeric: tabular-nums; text-align: right; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--accent); }
.scroll td:first-child { min-width: 14rem; overflow-wrap: normal; }
.scroll td:nth-child(2), .scroll th:nth-child(2) { text-align: left; }
.scroll table { font-size: .86rem; margin-top: .5rem; }
.key { display: inline-block; width: .8rem; height: .8rem; background: #3d85d0; margin: 0 .3rem 0 .8rem; }
.key.dense { background: #2fa36b; }
@media (max-width: 30rem) { .bar { grid-template-columns: 7.5rem 1fr 3.6rem; overflow-wrap: anywhere; } }
</style>"""

_HOW = (
    "Every side was compared with a float64 oracle before it was timed. Sides then ran in turn, a round each, and "
    "ratios are of times in the same round: the median, with the quartiles of the rounds. The limit is what a large "
    "copy and a large matrix product of PyTorch's reached in the same run; what stays in the cache, or multiplies "
    "better, may pass 100%. It is not given for sides that leave out what cannot change the result: they do less. "
    "Memory is the most that a call took beyond what was there; saved is what the graph keeps for the backward pass. "
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
    report.add_html(_BARS)
    report.add_tiles(_tiles(run))
    report.add_text(_HOW)
    for op in ops_of(run):
        rows = [row for row in run.rows if row.op == op]
        report.add_section(OPS.get(op, op))
        report.add_html(_bars(rows))
        report.add_html("<details><summary>All figures</summary>")
        report.add_table(_HEADER, [cells for row in rows for cells in _cells(row)])
        report.add_html("</details>")
    _add_shortcuts(report, run)
    roofline = plot_roofline(run)
    if roofline is not None:
        report.add_section(
            "Roofline",
            "What was reached, over the operations that a computation has for each byte that it must move. Left of the "
            "bend memory is the limit, right of it the matrix product.",
        )
        report.add_figure(roofline, "Operations a second over operations a byte, with the machine's limits")
    _add_scaling(report, run)
    versions = ", ".join(f"{name} {version}" for name, version in run.details.items())
    return report.html(f"clipfast at {run.commit}, {run.date}. {run.machine}: {versions}.")


def write_report(run: Run, path: Path) -> None:
    """Write the report of a run as one HTML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(report_html(run), encoding="utf-8")


def _tiles(run: Run) -> list[tuple[str, str]]:
    tiles = []
    for op, label in (("contrastive_loss", "contrastive loss"), ("towers", "whole towers")):
        ratios = [best.ratio for row in run.rows if row.op == op and (best := best_rival(row))]
        if ratios:
            tiles.append((f"{statistics.median(ratios):.2f} ×", f"{label}: the fastest rival's time, median of rows"))
    tiles.append((f"{run.limits.copy_gb_per_s:,.0f} GB/s", "a copy, read and written"))
    for dtype, tera in run.limits.product_tflop_per_s.items():
        speed = f"{tera:.3g} TFLOP/s" if tera >= 1 else f"{1000 * tera:.0f} GFLOP/s"
        tiles.append((speed, f"a matrix product, {dtype}"))
    return tiles


def _bars(rows: list[Row]) -> str:
    """How many times as long each rival takes, drawn; a line stands at 1."""
    parts = ['<div class="bars"><p class="note">Each rival’s time over clipfast’s; the line is 1\u00a0×.']
    if any(DENSE in row.sides for row in rows):
        parts.append('<span class="key"></span>with exact shortcuts<span class="key dense"></span>every token computed')
    parts.append("</p>")
    for row in rows:
        if OURS not in row.sides or not row.rivals:
            continue
        most = max(1.0, *(found.ratio for found in speed_ups(row))) * 1.02
        if DENSE in row.sides:
            most = max(most, *(found.ratio for found in speed_ups(row, DENSE)))
        parts.append(f"<h3>{escape(row.label)}, {escape(row.direction)}</h3>")
        for found in speed_ups(row):
            parts.append(_bar(found.rival, found.ratio, most, ""))
            if DENSE in row.sides:
                parts.append(_bar("", row.ratio(found.rival, DENSE), most, "dense"))
    return "".join(parts) + "</div>"


def _bar(name: str, ratio: float, most: float, kind: str) -> str:
    return (
        f'<div class="bar"><span>{escape(name)}</span><span class="track"><i class="{kind}" '
        f'style="width:{100 * ratio / most:.1f}%"></i><u style="left:{100 / most:.1f}%"></u></span>'
        f"<b>{ratio:.2f} ×</b></div>"
    )


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
    report.add_table(header, cells)


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
    report.add_table(header, table)
