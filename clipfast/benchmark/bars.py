"""The bars of a report: time and memory of every rival over clipfast's, on one logarithmic scale a page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

from clipfast.benchmark.groups import Group
from clipfast.benchmark.results import DENSE, OURS, Row, Run
from clipfast.benchmark.summary import bytes_text, is_counted, memory_ratio, own_operator, ratio_text, speed_ups
from clipfast.console import counted

_LEAST, _MOST = -4, 10  # powers of two: a bar beyond ends at the scale's end, with an arrow


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis of ratios; all bars of a page are drawn on the same.

    Attributes:
        low: The left end, as a power of two.
        high: The right end.
    """

    low: int
    high: int

    @classmethod
    def of(cls, ratios: Iterable[float]) -> Scale:
        """Return a scale that holds the ratios, ½ and 4 at least."""
        powers = [math.log2(ratio) for ratio in ratios]
        low, high = math.floor(min(powers, default=0)), math.ceil(max(powers, default=0))
        return cls(max(_LEAST, min(-1, low)), min(_MOST, max(2, high)))

    def place(self, ratio: float) -> float:
        """Return where a ratio stands, in percent of the width; 0 or 100 for what lies beyond an end."""
        share = (math.log2(ratio) - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, share))

    def is_beyond(self, ratio: float) -> bool:
        """Return whether a ratio lies beyond an end."""
        return not self.low <= math.log2(ratio) <= self.high

    def ticks(self) -> list[tuple[float, str]]:
        """Return the places and words of the powers of two, 1 × among them: at most eight."""
        step = math.ceil((self.high - self.low) / 7)
        powers = [power for power in range(self.low, self.high + 1) if power % step == 0]
        words = {-1: "½", -2: "¼", -3: "⅛", 0: "1\u00a0×"}
        return [(self.place(2.0**p), words.get(p, f"{2**p}" if p > 0 else f"1/{2**-p}")) for p in powers]


def scale_of(run: Run) -> Scale:
    """Return the scale of a run's page: of all ratios of time and of memory that are drawn."""
    ratios = []
    for row in run.rows:
        for ours in (OURS, DENSE):
            if ours in row.sides:
                ratios += [found.ratio for found in speed_ups(row, ours)]
        if OURS in row.sides:
            ratios += [ratio for rival in row.rivals if (ratio := memory_ratio(row, rival, run.device)) is not None]
    return Scale.of(ratios)


def style(scale: Scale) -> str:
    """Return the style of all bars of a page; the 1 × line is in it, once."""
    return f"<style>:root {{ --one: {scale.place(1):.2f}%; --octave: {100 / (scale.high - scale.low):.4f}%; }}{_STYLE}"


_STYLE = """
:root { --time: #3d85d0; --memory: #2fa36b; --less: #8a8f98; }
.bars { margin: 1rem 0 1.5rem; }
.bars h3 { font-size: .95rem; font-weight: 600; line-height: 1.3; margin: 1.1rem 0 .2rem; }
.bars ul { list-style: none; margin: 0; padding: 0; }
.bars .note { font-size: .8rem; margin: 0 0 .2rem; }
.bar, .axis { display: grid; grid-template-columns: minmax(0, 10rem) minmax(0, 1fr) minmax(0, 1fr); column-gap: 1.2rem;
  align-items: stretch; font-size: .82rem; line-height: 1.25; }
.bar .who { align-self: center; padding: .2rem 0; }
.cell { display: grid; position: relative; grid-template-columns: minmax(0, 1fr) 4.9rem; column-gap: .4rem; }
.axis .what { display: none; }
.axis { position: sticky; top: 0; z-index: 1; background: var(--page); color: var(--soft); font-size: .72rem;
  padding: .25rem 0 .1rem; }
.axis .ticks { position: relative; height: 2.5em; }
.axis .ticks em { position: absolute; left: 0; top: 0; font-style: normal; white-space: nowrap; }
.axis .ticks s { position: absolute; bottom: 0; transform: translateX(-50%); text-decoration: none;
  white-space: nowrap; }
.axis .ticks s.one { color: var(--ink); font-weight: 700; }
.track { position: relative; min-height: 1.35rem;
  background: repeating-linear-gradient(to right, var(--rule) 0 1px, transparent 1px var(--octave)); }
.track::after { content: ""; position: absolute; left: calc(var(--one) - 1px); top: 0; bottom: 0; width: 2px;
  background: var(--ink); }
.track i { position: absolute; top: calc(50% - .4rem); height: .8rem; background: var(--less); }
.track i.more { background: var(--time); }
.memory .track i.more { background: var(--memory); }
.two .time .track { min-height: 2.1rem; }
.two .time .track i { top: calc(50% - .75rem); }
.two .time .track i.dense { top: calc(50% + .2rem); height: .5rem; background: var(--page);
  border: 2px solid var(--less); }
.two .time .track i.dense.more { border-color: var(--time); }
.track i.beyond::before { content: "▸"; position: absolute; right: .1rem; line-height: .8rem; color: var(--page); }
.track i.beyond.less::before { content: "◂"; right: auto; left: .1rem; }
.track, .key { forced-color-adjust: none; }
.value { align-self: center; text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.value b { font-weight: 600; }
.value small { display: block; font-size: .7rem; }
.words { grid-column: 1 / -1; align-self: center; color: var(--soft); font-size: .74rem; }
.bar .what { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.absent { color: var(--soft); font-size: .8rem; padding: .1rem 0; }
.key { display: inline-block; width: 1.6rem; height: .7rem; margin: 0 .35rem 0 .1rem; background: var(--time); }
.key.memory { background: var(--memory); }
.key.less { background: var(--less); }
.key.dense { background: none; border: 2px solid var(--time); }
.legend span { display: inline-block; margin-right: 1rem; }
@media (max-width: 40rem) {
  .bar, .axis { display: block; }
  .bar { padding: .15rem 0; }
  .bar .who { font-weight: 600; padding: .1rem 0; }
  .cell { grid-template-columns: 3.4rem minmax(0, 1fr) 4.9rem; }
  .track { min-height: 1.2rem; }
  .axis .what { display: inline; }
  .axis .memory, .axis .ticks em { display: none; }
  .axis .ticks { height: 1.2em; }
  .words { grid-column: auto / span 2; }
  .bar .what { position: static; width: auto; height: auto; clip-path: none; align-self: center;
    color: var(--soft); font-size: .74rem; }
}
</style>"""


def legend_html(run: Run) -> str:
    """Return how to read the bars, with the keys of what the run has."""
    keys = [("", "time"), ("memory", "peak memory"), ("less", "less than clipfast’s")]
    if any(DENSE in row.sides for row in run.rows):
        keys.append(("dense", "time, every token computed (dense)"))
    drawn = "".join(f'<span><i class="key {kind}"></i>{words}</span>' for kind, words in keys)
    return (
        '<p class="note">A bar is a rival’s time or peak memory over clipfast’s. To the right of the line at 1\u00a0× '
        "the rival takes more, to the left of it, in grey, less. All bars of this page have one logarithmic scale.</p>"
        f'<p class="note legend">{drawn}</p>'
    )


def bars_html(group: Group, scale: Scale, device: str) -> str:
    """Return a group's bars, those of the same operator on both sides folded at its end.

    Args:
        group: With its rows.
        scale: The page's.
        device: The run's, which says what memory counts.
    """
    labels = [row.label for row in group.rows + group.same]
    drawn, same = (
        "".join(_row(row, scale, device, alone=labels.count(row.label) == 1) for row in rows)
        for rows in (group.rows, group.same)
    )
    if group.ties is not None and same:
        low, high = group.ties
        count = counted(len(group.same), "row")
        same = (
            f"<details><summary>The same operator on both sides: {count}, rivals take {_range(low, high)} clipfast’s "
            'time</summary><p class="note">clipfast calls PyTorch’s own operator in these: a tie with it is by '
            f"construction.</p>{_axis(scale)}{same}</details>"
        )
    return f'<div class="bars">{_axis(scale) if drawn else ""}{drawn}{same}</div>' if drawn or same else ""


def group_words(group: Group) -> str:
    """Return what a group comes to, in a sentence; nothing where there is no rival."""
    if group.fastest is None:
        return "clipfast calls PyTorch’s own operator in every row." if group.same and not group.rows else ""
    low, high, count = group.fastest
    if count == 1:
        return f"The fastest rival takes {ratio_text(low)} clipfast’s time."
    return f"The fastest rival of each of {count} rows takes {_range(low, high)} clipfast’s time."


def _range(low: float, high: float) -> str:
    least, most = ratio_text(low), ratio_text(high)
    return most if least == most else f"{least.removesuffix(chr(0xA0) + '×')} to {most}"


def _axis(scale: Scale) -> str:
    ticks = "".join(
        f'<s{" class=one" if words.startswith("1" + chr(0xA0)) else ""} style="left:{place:.2f}%">{words}</s>'
        for place, words in scale.ticks()
    )
    cells = "".join(
        f'<span class="cell {kind}"><span class="what"></span><span class="ticks"><em>{words}</em>{ticks}</span></span>'
        for kind, words in (("time", "time over clipfast’s"), ("memory", "peak memory over clipfast’s"))
    )
    return f'<div class="axis" aria-hidden="true"><span></span>{cells}</div>'


def _row(row: Row, scale: Scale, device: str, *, alone: bool) -> str:
    """A row's rivals; its direction is told where it trains, or where another row has the same label."""
    if not row.rivals and not row.missing:
        return ""
    told = row.direction != "step" and not (alone and row.direction == "forward")
    label = f"{row.label}, {row.direction}" if told else row.label
    parts = [f"<h3>{escape(label)}</h3>"]
    if (operator := own_operator(row)) is not None:
        parts.append(f'<p class="note">PyTorch’s own operator serves clipfast’s call: {escape(operator)}.</p>')
    elif "served_by" in row.facts:
        parts.append(f'<p class="note">Served by {escape(str(row.facts["served_by"]))}.</p>')
    parts.append('<ul role="list">')
    if OURS in row.sides:
        dense = {found.rival: found.ratio for found in speed_ups(row, DENSE)} if DENSE in row.sides else {}
        for found in speed_ups(row):
            time = _cell("time", found.ratio, dense.get(found.rival), scale)
            memory = _memory(row, found.rival, scale, device)
            kind = "bar two" if dense else "bar"
            parts.append(f'<li class="{kind}"><span class="who">{_name(found.rival)}</span>{time}{memory}</li>')
    reasons: dict[str, list[str]] = {}
    for name, reason in row.missing.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        parts.append(f'<li class="absent">{escape(", ".join(names))}: {escape(reason)}</li>')
    return "".join(parts) + "</ul>"


def _memory(row: Row, rival: str, scale: Scale, device: str) -> str:
    """A bar where both counted something; where the count of one is too small to divide by, both in words."""
    ratio = memory_ratio(row, rival, device)
    if ratio is not None:
        return _cell("memory", ratio, None, scale)
    ours, theirs = row.sides[OURS].peak_bytes, row.sides[rival].peak_bytes
    if ours is None or theirs is None:
        return ""
    least = "under 1 MB" if device == "cpu" else "nothing"
    words = [bytes_text(count) if is_counted(count, device) else least for count in (theirs, ours)]
    text = words[0] if words[0] == words[1] else f"{words[0]}; clipfast’s {words[1]}"
    return f'<span class="cell memory"><span class="what">memory </span><span class="words">{text}</span></span>'


def _cell(kind: str, ratio: float, dense: float | None, scale: Scale) -> str:
    bars = _bar(ratio, scale, "")
    value = f"<b>{ratio_text(ratio)}</b>"
    if dense is not None:
        bars += _bar(dense, scale, "dense")
        value += f"<small>dense {ratio_text(dense)}</small>"
    return (
        f'<span class="cell {kind}"><span class="what">{kind} </span>'
        f'<span class="track" aria-hidden="true">{bars}</span><span class="value">{value}</span></span>'
    )


def _bar(ratio: float, scale: Scale, kind: str) -> str:
    left, right = sorted((scale.place(1), scale.place(ratio)))
    classes = " ".join(filter(None, ("more" if ratio >= 1 else "less", kind, "beyond" * scale.is_beyond(ratio))))
    return f'<i class="{classes}" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'


def _name(name: str) -> str:
    """A rival's name; one that no narrow column holds may be parted behind an underscore."""
    text = escape(name)
    return text.replace("_", "_<wbr>") if len(name) > 16 and " " not in name else text
