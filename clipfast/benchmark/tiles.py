"""The tiles of a report: what a user gains, in plain words."""

from __future__ import annotations

from clipfast.benchmark.groups import key_of
from clipfast.benchmark.results import OURS, Row, Run
from clipfast.benchmark.summary import best_rival, bytes_text, memory_ratio, ratio_text

_KNOWN = "open_clip"  # whom most users come from
_IMAGES = ("images", "forward")
_TIE = 1.02  # what is closer is called as fast

Tile = tuple[str, str, str]
"""The figure, what it means, and what it is of."""


def tiles_of(run: Run) -> list[Tile]:
    """Return a tile for each thing that users decide by, as far as the run has it.

    A tile is of one row, which it names: of several, of the one in the middle (the lower of two), and never of the
    best; of the losses, of the largest batch in float32.
    """
    rows = [row for row in run.rows if OURS in row.sides and row.rivals]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key_of(row), []).append(row)
    found = []
    for key, what in (
        ("prompts", "Zero-shot prompts"),
        ("step", "Training step"),
        ("accelerate", "One line, clipfast.accelerate"),
        ("towers", "Images"),
    ):
        some = [row for row in groups.get(key, []) if key != "towers" or (row.unit, row.direction) == _IMAGES]
        some = [row for row in some if _KNOWN in row.rivals] or some
        if some:
            found.append(_speed(_middle(some), what))
    losses = [row for row in groups.get("contrastive_loss", []) if row.dtype == "float32" and not _is_siglip(row)]
    if losses:
        largest = max(losses, key=lambda row: row.at or 0)
        what = f"Loss at {largest.label.removesuffix(', float32')}"
        found += [*_memory(largest, what, run.device), _speed(largest, what)]
    return found


def _is_siglip(row: Row) -> bool:
    return row.name.startswith("siglip")


def _rival(row: Row) -> str:
    fastest = best_rival(row)
    return _KNOWN if _KNOWN in row.rivals or fastest is None else fastest.rival


def _middle(rows: list[Row]) -> Row:
    by_gain = sorted(rows, key=lambda row: row.ratio(_rival(row)))
    return by_gain[(len(rows) - 1) // 2]


def _words(ratio: float) -> tuple[str, str]:
    """How fast clipfast is, and the word that the rival's name follows."""
    if 1 / _TIE < ratio < _TIE:
        return "as fast", "as"
    return (f"{ratio_text(ratio)} faster", "than") if ratio > 1 else (f"{ratio_text(1 / ratio)} slower", "than")


def _speed(row: Row, what: str) -> Tile:
    rival, fastest = _rival(row), best_rival(row)
    figure, than = _words(row.ratio(rival))
    meaning = f"{than} {rival}"
    if fastest is not None and fastest.rival != rival:
        other, than = _words(fastest.ratio)
        meaning += f", and {other} {than} the fastest rival there ({fastest.rival})"
    return figure, f"{meaning}: {row.label}", what


def _memory(row: Row, what: str, device: str) -> list[Tile]:
    rival = _rival(row)
    ratio = memory_ratio(row, rival, device)
    if ratio is None:
        return []
    ours, theirs = row.sides[OURS].peak_bytes, row.sides[rival].peak_bytes
    less = f"{ratio_text(ratio)} less" if ratio > 1 else f"{ratio_text(1 / ratio)} more"
    return [(bytes_text(ours), f"in place of {rival}’s {bytes_text(theirs)}: {less} memory", what)]
