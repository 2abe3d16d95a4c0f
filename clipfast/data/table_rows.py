"""Tables in text files, row by row: CSV with its quotes, TSV as its tabs and lines say."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from clipfast.data.text_files import iterate_lines

# a quoted cell of more characters is a quote that nobody closed
_LONGEST_CELL = 1 << 24


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        line: Where it begins, from 1.
        cells: What it holds.
    """

    line: int
    cells: list[str]


def read_rows(
    table: str | os.PathLike[str],
    *,
    separator: str | None = None,
    quoted: bool | None = None,
    encoding: str | None = None,
) -> Iterator[Row]:
    """Yield the rows of a table, its header first; blank lines are passed over.

    Lines end with ``\\n`` or ``\\r\\n``. Where quotes count, a cell that begins with ``"`` goes on to the next one,
    over separators and line ends, and ``""`` in it is one. Anything else is refused: a caption that begins with a
    quote and lacks the second would swallow the rows behind it. Where they do not count, they are characters.

    Args:
        table: The file.
        separator: One character between cells; by default a tab for names that end with ``.tsv``, else a comma.
        quoted: Whether quotes count; by default where the separator is no tab.
        encoding: As :func:`clipfast.data.text_files.check_encoding`.

    Raises:
        OSError: The file cannot be read.
        ValueError: A quote is wrong (names the file and the line), the encoding is another, or ``separator`` is no
            character.
    """
    if separator is None:
        separator = "\t" if Path(table).suffix.lower() == ".tsv" else ","
    if len(separator) != 1 or separator in '\r\n"':
        raise ValueError(f"separator: got {separator!r}, expected one character, such as ',', ';' or a tab")
    if quoted is None:
        quoted = separator != "\t"
    lines = iterate_lines(table, encoding)
    return _read_quoted(os.fspath(table), lines, separator) if quoted else _read_plain(lines, separator)


def _read_plain(lines: Iterator[str], separator: str) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        text = line.removesuffix("\n").removesuffix("\r")
        if text:
            yield Row(number, text.split(separator))


def _read_quoted(name: str, lines: Iterator[str], separator: str) -> Iterator[Row]:
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    number = 0
    for line in lines:
        number += 1
        text = line.removesuffix("\n").removesuffix("\r")
        if not text:
            continue
        if '"' not in text:
            yield Row(number, text.split(separator))
            continue
        reader = csv.reader(chain([line], lines), delimiter=separator, strict=True)
        try:
            cells = next(reader)
        except csv.Error as error:
            end = number + reader.line_num - 1
            lines_read = f"line {number}" if end == number else f"lines {number} to {end}"
            raise ValueError(
                f"{name}: got no row in {lines_read} ({error}), expected a cell that begins with a quote to end with "
                f"one and to double those within: mend the row, or let no quotes count"
            ) from error
        yield Row(number, cells)
        number += reader.line_num - 1
