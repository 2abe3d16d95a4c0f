"""What a README says of a run: rows that users decide by, against open_clip, transformers and the fastest rival."""

from __future__ import annotations

from dataclasses import dataclass

from clipfast.benchmark.results import OURS, Row, Run
from clipfast.benchmark.summary import best_rival, bytes_text, machine_text, memory_ratio, time_text

LIBRARIES = ("open_clip", "transformers")
"""The sides that have a column of their own."""
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
PLAIN = {"PyTorch": "plain PyTorch", "open_clip, compiled, frozen": "open_clip compiled"}
"""Sides that a reader without the benchmarks' words would not know, and a long one."""


@dataclass(frozen=True)
class Comparison:
    """One line of the README's table, and one bar of its chart.

    Attributes:
        key: Which of the questions it answers: ``"prompts"``, ``"training"``, ``"loss memory"``, ...
        title: That in words, with the dtype.
        what: The same with how much of it was measured.
        model: Whose towers; empty for losses.
        ours: clipfast's figure, with its unit.
        theirs: The figures of the sides that have one, by name, as text.
        ratios: Each of them over clipfast's, by name: above 1 clipfast is ahead.
        best: The name of the rival that comes closest; None where nobody else does the same.
    """

    key: str
    title: str
    what: str
    model: str
    ours: str
    theirs: dict[str, str]
    ratios: dict[str, float]
    best: str | None


def comparisons(run: Run) -> list[Comparison]:
    """Return the README's comparisons in their order; those that a run has no rows for are left out.

    Rows are found by op, unit, dtype and direction, not by their names. Of several models the first that was measured
    counts, of several sizes the largest: there every rival was measured, also those that take long to build.
    """
    towers, images = {"op": "towers"}, {"op": "towers", "unit": "images", "direction": "forward"}
    loss = _largest(run, op="contrastive_loss", series="contrastive loss, float32")
    found = [
        _by_time("prompts", "{}zero-shot prompts", _largest(run, **towers, unit="prompts", dtype="bfloat16")),
        _by_time("image", "{}images", _largest(run, **images, dtype="bfloat16")),
        _by_time("image, fp32", "{}images", _largest(run, **images, dtype="float32")),
        _by_time("SigLIP", "{}SigLIP images", _largest(run, **images, dtype="bfloat16", family="SigLIP")),
        _by_time("training", "training step", _largest(run, **towers, direction="step")),
        _of_accelerate(run),
        _by_time("loss", "loss: time", loss),
        _by_memory("loss memory", "loss: memory", loss, run.device),
    ]
    return [comparison for comparison in found if comparison is not None]


def comparison_of(run: Run, key: str, *sides: str) -> Comparison:
    """Return one comparison that has to be there, with certain sides.

    Raises:
        ValueError: The run has no such row, or the row no such side.
    """
    for comparison in comparisons(run):
        if comparison.key == key:
            if lacking := [side for side in sides if side not in comparison.ratios]:
                raise ValueError(f"the run at {run.commit}: its row for {key} has no {lacking[0]}, expected one")
            return comparison
    raise ValueError(f"the run at {run.commit}: got no row for {key}, expected one of all benchmarks")


def side_text(side: str) -> str:
    """Return a side's name as a reader of the README knows it."""
    return PLAIN.get(side, side)


def where_text(run: Run) -> str:
    """Return date, commit, machine and PyTorch of a run."""
    torch = run.details.get("torch", "?").split("+")[0]
    return f"Measured on {run.date} at commit `{run.commit}`: {machine_text(run)}, PyTorch {torch}"


def short_dtypes(text: str) -> str:
    """Return a text with the short names of dtypes."""
    for name, short in SHORT.items():
        text = text.replace(name, short)
    return text


def joined(figures: list[str]) -> str:
    """Return figures with one unit behind the last, "135, 141 ms"; with all units where they differ."""
    units = {figure.partition(" ")[2] for figure in figures}
    return ", ".join([*(f.partition(" ")[0] for f in figures[:-1]), figures[-1]] if len(units) == 1 else figures)


# --- rows ---------------------------------------------------------------------------------------------------


def _largest(run: Run, *, family: str = "", series: str | None = None, **wanted: str) -> Row | None:
    """Return the row of the most items, of the first model that has the properties; None for none."""
    rows = [
        row
        for row in run.rows
        if all(getattr(row, name) == value for name, value in wanted.items())
        and series in (None, row.series)
        and _is_of(row, family)
        and OURS in row.sides
        and row.rivals
    ]
    return max((row for row in rows if _model(row) == _model(rows[0])), key=lambda row: row.items, default=None)


def _model(row: Row) -> str:
    return row.label.split(",")[0] if row.op == "towers" else ""


def _is_of(row: Row, family: str) -> bool:
    """Tell classic CLIP's towers from SigLIP's, and from NaFlex's, whose images differ in size."""
    if row.op != "towers":
        return True
    model = _model(row)
    return "NaFlex" not in model and ("SigLIP" in model) == (family == "SigLIP")


def _words(title: str, row: Row) -> dict[str, str]:
    """Return title, amount and model of a row; the amount stands where the title has a place for it, or behind it."""
    dtype, amount = short_dtypes(row.dtype), f"{row.items:,}"
    what = title.format(f"{amount} ") if "{}" in title else f"{title}, {amount} {row.unit}"
    return {"title": f"{title.format('')}, {dtype}", "what": f"{what}, {dtype}", "model": _model(row)}


def _by_time(key: str, title: str, row: Row | None) -> Comparison | None:
    if row is None:
        return None
    best = best_rival(row)
    return Comparison(
        key,
        **_words(title, row),
        ours=time_text(row.sides[OURS].seconds),
        theirs={name: time_text(row.sides[name].seconds) for name in row.rivals},
        ratios={name: row.ratio(name) for name in row.rivals},
        best=best.rival if best else None,
    )


def _by_memory(key: str, title: str, row: Row | None, device: str) -> Comparison | None:
    if row is None:
        return None
    # what is lost in the counting is no figure to divide by
    found = {name: memory_ratio(row, name, device) for name in row.rivals}
    ratios = {name: ratio for name, ratio in found.items() if ratio is not None}
    if not ratios:
        return None
    return Comparison(
        key,
        **_words(title, row),
        ours=bytes_text(row.sides[OURS].peak_bytes),
        theirs={name: bytes_text(row.sides[name].peak_bytes) for name in ratios},
        ratios=ratios,
        best=min(ratios, key=ratios.__getitem__),
    )


def _of_accelerate(run: Run) -> Comparison | None:
    """Join what ``clipfast.accelerate`` did to each library's own model; the others are the model as it was."""
    chosen = accelerated(run)
    if not chosen:
        return None
    return Comparison(
        "accelerate",
        **_words("accelerate()", next(iter(chosen.values()))),
        ours=joined([time_text(row.sides[OURS].seconds) for row in chosen.values()]),
        theirs={library: time_text(row.sides[library].seconds) for library, row in chosen.items()},
        ratios={library: row.ratio(library) for library, row in chosen.items()},
        best=None,
    )


def accelerated(run: Run) -> dict[str, Row]:
    """Return the row of each library's own model that scores images against prompts in bfloat16, where there is one."""
    rows = [row for row in run.rows if (row.op, row.unit, row.dtype) == ("accelerate", "scores", "bfloat16")]
    found = {library: [row for row in rows if row.rivals == [library] and OURS in row.sides] for library in LIBRARIES}
    return {library: some[0] for library, some in found.items() if some}
