"""Pairs that a table lists: a row for every caption, with the path of its picture."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from clipfast.data.options import DataOptions, usual_name
from clipfast.data.pairs import Captions, PairError, Pairs
from clipfast.data.places import find_base, read_picture, refuse_urls
from clipfast.data.table_rows import read_rows
from clipfast.data.text_files import iterate_lines

# the header of a table names its columns: open_clip's names first
PATH_COLUMNS = (
    "filepath", "image", "image_path", "path", "file", "file_name", "filename", "image_name", "image_file",
)  # fmt: skip
CAPTION_COLUMNS = ("title", "caption", "text", "captions", "comment", "sentence", "sentences")
# endings of files in which a table may be
TABLES = (".csv", ".tsv", ".txt", ".token")
# what a table must say of its pairs
NEEDS = ("image", "caption")
# a column that numbers the captions of a picture, as in Flickr30k's results.csv
_NUMBER_COLUMNS = ("comment_number", "caption_number")
_TOKEN = re.compile(r"(?P<name>[^\t]+\.\w+)#\d+\t(?P<caption>.*)", re.DOTALL)


class _Row(NamedTuple):
    """A picture's name and a caption of it, or what is wrong with the row."""

    line: int
    name: str
    caption: str
    problem: str | None = None


class TableLayout(NamedTuple):
    """How a table is to be read.

    Attributes:
        separator: Between columns; None for Flickr's lists of ``name.jpg#0<tab>caption``, which have no header.
        image: The number of the column of paths, or None.
        caption: That of captions, or None.
        columns: How many there are.
        grouped: Whether rows of one picture are one sample with several captions, rather than pairs of their own.
        open_ended: Whether a row's last cell is all the rest of its line: captions there hold bare separators.
    """

    separator: str | None
    image: int | None = 0
    caption: int | None = 1
    columns: int = 2
    grouped: bool = True
    open_ended: bool = False


def table_layout(table: Path, options: DataOptions, needs: Sequence[str] = NEEDS) -> TableLayout | None:
    """Tell from a table's first line how it is to be read; None where it is no table of pictures and captions.

    Args:
        table: The file.
        options: What its columns and separator are, where the usual names do not say it.
        needs: Which of the two there must be.

    Raises:
        OSError, ValueError: It cannot be read.
    """
    first = next(islice(iterate_lines(table, options.encoding), 1), "").rstrip("\r\n")
    asked = options.image_column or options.caption_column
    if _TOKEN.fullmatch(first) and not asked:
        return TableLayout(None)
    is_list = table.suffix.lower() not in (".csv", ".tsv")
    for separator in _separators(table, options):
        header = _header(first, separator)
        image = _place(header, options.image_column, PATH_COLUMNS)
        caption = _place(header, options.caption_column, CAPTION_COLUMNS)
        there = {"image": image, "caption": caption}
        if any(there[name] is None for name in needs) or (len(header) < len(needs) and not asked):
            continue
        numbered = any(name in header for name in _NUMBER_COLUMNS)
        return TableLayout(
            separator,
            image,
            caption,
            len(header),
            grouped=is_list or numbered,
            open_ended=is_list and caption == len(header) - 1,
        )
    return None


def _separators(table: Path, options: DataOptions) -> Sequence[str]:
    if options.separator:
        return options.separator
    return "\t,|;" if table.suffix.lower() == ".tsv" else ",\t|;"


def _header(first: str, separator: str) -> list[str]:
    try:
        cells = next(csv.reader([first], delimiter=separator), [])
    except csv.Error:  # a line of something else
        cells = first.split(separator)
    return [name.strip() for name in cells]


def _place(header: Sequence[str], asked: str | None, usual: Iterable[str]) -> int | None:
    name = (asked if asked in header else None) if asked else usual_name(header, usual)
    return None if name is None else header.index(name)


class TablePairs(Pairs):
    """The pairs of a ``.csv`` or ``.tsv`` table, or of Flickr's lists; see :func:`clipfast.data.sources.open_pairs`.

    In a ``.csv`` or ``.tsv`` every row is a pair, as in open_clip; rows that name one picture have one key. In
    Flickr's lists a picture with its captions is a pair. A row with too few or too many cells is an error of its own.
    """

    def __init__(self, table: Path, options: DataOptions | None = None, needs: Sequence[str] = NEEDS) -> None:
        options = options or DataOptions()
        layout = table_layout(table, options, needs)
        if layout is None:
            raise ValueError(_no_columns(table, options, needs))
        rows = list(_rows(table, layout, options))
        if not rows:
            raise ValueError(f"data: got no pairs in {table}, expected at least one")
        names = [row.name for row in rows if row.name and not row.problem]
        refuse_urls(names, str(table))
        self._table = table
        self.files = (table,)
        self._base = find_base(table.parent, names)
        self._rows = _grouped(rows) if layout.grouped else [[row] for row in rows]
        self.groups = (len(self._rows),)
        self.repeats = True

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        row = self._rows[index][0]
        whole = row.name and not row.problem
        return str(self._base / row.name) if whole else f"{self._table}, line {row.line}"

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        row = self._rows[index][0]
        if row.problem or not row.name:
            raise PairError(f"{self.key(index)}: {row.problem or 'got no path'}")
        try:
            return read_picture(self._base / row.name)
        except OSError as error:
            raise PairError(f"{self._base / row.name}: {error}") from error

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        rows = self._rows[index]
        if rows[0].problem:
            raise PairError(f"{self.key(index)}: {rows[0].problem}")
        texts = [row.caption for row in rows if row.caption.strip()]
        blank = [(f"line {row.line}", "its caption is empty") for row in rows if not row.caption.strip()]
        return Captions(tuple(texts), tuple(blank)) if texts else Captions(("",))


def _rows(table: Path, layout: TableLayout, options: DataOptions) -> Iterator[_Row]:
    if layout.separator is None:
        for number, line in enumerate(iterate_lines(table, options.encoding), 1):
            text = line.rstrip("\r\n")
            found = _TOKEN.fullmatch(text)
            if found:
                yield _Row(number, found["name"], found["caption"])
            elif text.strip():
                yield _Row(number, "", "", f"got {text[:60]!r}, expected name#0, a tab and a caption")
        return
    if layout.open_ended:
        read: Iterable[tuple[int, list[str]]] = _open_ended_rows(table, layout, options)
    else:
        quoted = layout.separator in ",;" if options.quotes is None else options.quotes
        read = read_rows(table, separator=layout.separator, quoted=quoted, encoding=options.encoding)
    bare = layout.separator == "|"  # blanks stand around it in results.csv
    for line, cells in islice(read, 1, None):
        extra = [cell for cell in cells[layout.columns :] if cell.strip()]
        name, caption = (_cell(cells, place) for place in (layout.image, layout.caption))
        if extra or name is None or (caption is None and not name):
            yield _Row(
                line, "", "", f"got {len(cells)} cells, expected {layout.columns}: does a caption lack its quotes?"
            )
            continue
        name, caption = (name.strip(), (caption or "").strip()) if bare else (name, caption or "")
        problem = None if name.strip() or layout.image is None else "got no path"
        yield _Row(line, name, caption, problem)


def _cell(cells: Sequence[str], place: int | None) -> str | None:
    """Return a cell; nothing where the table has no such column, None where the row ends before it."""
    if place is None:
        return ""
    return cells[place] if place < len(cells) else None


def _open_ended_rows(table: Path, layout: TableLayout, options: DataOptions) -> Iterator[tuple[int, list[str]]]:
    """Yield lines cut at their first separators: what is left is the caption, with or without quotes around it."""
    for number, line in enumerate(iterate_lines(table, options.encoding), 1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        *cells, last = text.split(layout.separator, layout.columns - 1)
        if len(last) > 1 and last[0] == last[-1] == '"':
            last = last[1:-1].replace('""', '"')
        yield number, [*cells, last]


def _grouped(rows: list[_Row]) -> list[list[_Row]]:
    """Put the rows of one picture together; each row that cannot be read stays by itself."""
    groups: dict[str | int, list[_Row]] = {}
    for row in rows:
        groups.setdefault(row.name if row.name and not row.problem else row.line, []).append(row)
    return list(groups.values())


def _no_columns(table: Path, options: DataOptions, needs: Sequence[str]) -> str:
    first = next(islice(iterate_lines(table, options.encoding), 1), "").rstrip("\r\n")
    separator = _separators(table, options)[0]
    header = _header(first, separator)
    if any(name.startswith(("http://", "https://")) for name in header):
        return (
            f"data: got URLs in {table}, expected paths of pictures: fetch them first, for instance with img2dataset, "
            f"and give the shards or the folder that it writes"
        )
    wanted = []
    if "image" in needs and _place(header, options.image_column, PATH_COLUMNS) is None:
        wanted.append(f"{options.image_column!r}" if options.image_column else f"one of {PATH_COLUMNS} for pictures")
    if "caption" in needs and _place(header, options.caption_column, CAPTION_COLUMNS) is None:
        wanted.append(
            f"{options.caption_column!r}" if options.caption_column else f"one of {CAPTION_COLUMNS} for captions"
        )
    got = ", ".join(header)[:300] or "none"
    return (
        f"data: got the columns {got} in {table}, expected {' and '.join(wanted)}, or --image-column, --caption-column"
    )
