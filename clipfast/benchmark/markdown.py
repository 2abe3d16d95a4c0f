"""A run as a Markdown table, and its place in a README."""

from __future__ import annotations

from clipfast.benchmark.results import DENSE, OURS, Row, Run
from clipfast.benchmark.summary import OPS, best_rival, bytes_text, machine_text, ops_of, shortcut_gain, time_text

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"


def markdown_table(run: Run) -> str:
    """Return a line a row: clipfast's time, and the fastest rival's over it, dense and with exact shortcuts."""
    lines = [
        f"Measured on {run.date} at commit `{run.commit}`: {machine_text(run)}, PyTorch "
        f"{run.details.get('torch', '?')}, the {run.scale} set{'' if run.complete else ', a part of it'}. The fastest "
        "rival of each row, and its time over clipfast's in the same rounds: above 1, clipfast is faster.",
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


def _line(row: Row) -> str:
    ours, best = row.sides[OURS], best_rival(row)
    dense = best_rival(row, DENSE) if shortcut_gain(row) is not None else None
    cells = [
        _escaped(row.name),
        time_text(ours.seconds),
        bytes_text(ours.peak_bytes),
        _escaped(best.rival) if best else "none was there",
        f"{best.ratio:.2f} ×" if best else "–",
        f"{dense.ratio:.2f} ×" if dense else "",
    ]
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def update_section(text: str, run: Run) -> str:
    """Return a README's text with the table of a run between its two marks.

    Raises:
        ValueError: A mark is missing, or they stand in the wrong order.
    """
    for mark in (BEGIN, END):
        if text.count(mark) != 1:
            raise ValueError(f"expected the line {mark} once, got it {text.count(mark)} times")
    before, rest = text.split(BEGIN)
    if END not in rest:
        raise ValueError(f"expected {BEGIN} before {END}")
    return f"{before}{BEGIN}\n{markdown_table(run)}{END}{rest.split(END)[1]}"
