"""A report in one HTML file: no scripts, no other files, light and dark, wide and narrow."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from clipfast.visualize.figures import figure_svg

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1d2129; --soft: #5c6470; --rule: #d9dde3; --panel: #f5f6f8;
  --good: #17784a; --accent: #2a6cb5; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --ink: #e8eaee; --soft: #a3abb8; --rule: #3a414d;
  --panel: #1d2129; --good: #5fcf9a; --accent: #7db4f0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 58rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: 1rem; border-top: 1px solid var(--rule); }
p { max-width: 42rem; margin: .5rem 0; }
small, .note { color: var(--soft); }
a { color: var(--accent); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--panel); border-radius: .5rem; padding: .75rem 1rem; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.2; }
.tile small { display: block; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .9rem .3rem 0; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { font-weight: 600; }
td + td, th + th { text-align: right; white-space: nowrap; }
table.words td { white-space: normal; text-align: left; }
table.words td:first-child { white-space: nowrap; color: var(--soft); }
.plot svg { display: block; width: 100%; height: auto; max-width: 38rem; }
.plot svg text { font-family: system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif !important; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: .75rem; }
.card { display: flex; gap: .9rem; align-items: flex-start; margin: 0; padding: .75rem; background: var(--panel);
  border-radius: .5rem; }
.card img { flex: none; width: 80px; height: 80px; border-radius: .35rem; background: #fff; }
.card figcaption { flex: 1; min-width: 0; font-size: .86rem; line-height: 1.4; }
.card ol { margin: 0; padding-left: 1.4em; }
.card li { padding-left: .1em; }
.card li span { margin-right: .3em; }
.card .right { color: var(--good); font-weight: 600; }
.card .right::marker { content: "✓ "; }
.card .missed { margin: .3rem 0 0; color: var(--soft); }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); font-size: .86rem;
  color: var(--soft); }
"""


class Report:
    """A page that is filled from top to bottom, then written.

    Text that is passed in is escaped; only :meth:`add_html` takes markup.
    """

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._parts = [f"<h1>{escape(title)}</h1>"]
        self.add_text(lead)

    def add_section(self, heading: str, text: str = "") -> None:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(heading)}</h2>")
        if text:
            self.add_text(text)

    def add_text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def add_tiles(self, tiles: Sequence[tuple[str, ...]]) -> None:
        """Add the figures that matter most, each with its meaning and, above it, what it is of where that is given."""
        cells = (
            f'<div class="tile">{"".join(f"<small>{escape(what)}</small>" for what in of)}'
            f"<b>{escape(value)}</b><small>{escape(label)}</small></div>"
            for value, label, *of in tiles
        )
        self._parts.append(f'<div class="tiles">{"".join(cells)}</div>')

    def add_table(self, header: Sequence[str], rows: Sequence[Sequence[str]], label: str = "") -> None:
        """Add a table; without a header, its columns hold words and not figures.

        With a label, which says what it holds, keys scroll it where it is wider than the page.
        """
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        kind = "" if header else ' class="words"'
        scroll = f' tabindex="0" role="region" aria-label="{escape(label)}"' if label else ""
        self._parts.append(
            f'<div class="scroll"{scroll}><table{kind}>{f"<thead><tr>{head}</tr></thead>" if header else ""}'
            f"<tbody>{body}</tbody></table></div>"
        )

    def add_figure(self, figure: Figure, label: str) -> None:
        """Add a figure of :mod:`clipfast.visualize`, with its description."""
        self._parts.append(f'<div class="plot">{figure_svg(figure, escape(label))}</div>')

    def add_html(self, html: str) -> None:
        """Add markup as it is."""
        self._parts.append(html)

    def html(self, footer: str = "") -> str:
        """The whole page."""
        end = f"<footer>{escape(footer)}</footer>" if footer else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self._title)}</title><style>{_STYLE}</style></head>\n"
            f"<body>\n{chr(10).join(self._parts)}\n{end}</body></html>\n"
        )

    def write(self, path: Path, footer: str = "") -> None:
        """Write the page as UTF-8; a lone surrogate, which UTF-8 lacks, becomes ``\\udce9``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.html(footer), encoding="utf-8", errors="backslashreplace")
