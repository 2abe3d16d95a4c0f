"""What is embedded: pictures or texts by number, from a folder, a list, Parquet, shards or a table."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from clipfast.data.pairs import PairError, PairSource
from clipfast.data.parquet import find_column, open_parquet
from clipfast.data.patterns import find_shards
from clipfast.data.pictures import PICTURES
from clipfast.data.sources import open_pairs
from clipfast.data.table_pairs import CAPTION_COLUMNS, PATH_COLUMNS

Kind = Literal["image", "text"]
KINDS = ("image", "text")
_EXPECTED = "a folder, a .txt list, .parquet, .tar shards, or a .csv or .tsv table"
_PICTURE_COLUMNS = (*PATH_COLUMNS, "bytes", "jpg", "png")


class Inputs(Protocol):
    """N pictures or texts.

    Attributes:
        kind: "image" or "text".
    """

    kind: Kind

    def __len__(self) -> int:
        """Return N."""
        ...

    def name(self, row: int) -> str:
        """What to call a row: a picture's path, or a text itself. To be called once, after :meth:`read`."""
        ...

    def read(self, row: int) -> bytes | str:
        """Read a row: the bytes of a picture's file, or a text.

        Raises:
            PairError, OSError: This row cannot be read. The others can.
        """
        ...

    def fingerprint(self) -> str:
        """A digest of what and where the rows are: another one means that rows have other numbers."""
        ...


def open_inputs(path: str | os.PathLike[str], kind: Kind = "image", column: str | None = None) -> Inputs:
    """Find what is to be embedded.

    Args:
        path: One of

            - a folder of pictures, also in folders below it, in the order of their paths; of ``.txt`` files for texts;
            - a ``.txt`` list: a picture's path, relative to the list, or a text on every line;
            - a ``.parquet`` file with a column of paths (relative to the file), of pictures' bytes, or of texts;
            - shards or a table as for :func:`clipfast.data.sources.open_pairs`: its pictures, or its captions.
        kind: ``"image"`` or ``"text"``.
        column: Of Parquet; the first of the usual names by default (``path``, ``image``, ``text``, ``caption``, …).

    Raises:
        FileNotFoundError: A file or folder is missing.
        ImportError: pyarrow is missing, for Parquet.
        ValueError: Nothing is there, or the column is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected 'image' or 'text'")
    text = os.fspath(path)
    place = Path(text)
    shards = find_shards(text)
    if shards or place.suffix.lower() in (".csv", ".tsv"):
        if column:
            raise ValueError(f"column: got {column!r} for {text}, expected none: only Parquet's columns can be chosen")
        return _Pairs(open_pairs(text), kind, shards or [place])
    if place.is_dir():
        return _folder(place, kind)
    if not place.is_file():
        raise FileNotFoundError(f"input: got {text}, expected {_EXPECTED}: none is there")
    if place.suffix.lower() == ".parquet":
        return _Parquet(place, kind, column)
    if place.suffix.lower() == ".txt":
        lines = [line for line in _lines(place) if line.strip()]
        return _Files(lines, kind, place.parent, place) if kind == "image" else _Texts(lines, place)
    raise ValueError(f"input: got {text}, expected {_EXPECTED}")


class _Files:
    """Files by their names; a name that is not absolute is below ``base``."""

    def __init__(self, names: list[str], kind: Kind, base: Path, place: Path) -> None:
        if not names:
            what = f"pictures ({', '.join(PICTURES)})" if kind == "image" else "texts (.txt)"
            raise ValueError(f"input: got no {what} in {place}, expected at least one")
        self.kind = kind
        self._names, self._base = names, base

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        return self._names[row]

    def read(self, row: int) -> bytes | str:
        data = (self._base / self._names[row]).read_bytes()
        return data if self.kind == "image" else _decoded(data, self._names[row])

    def fingerprint(self) -> str:
        return _digest("files", self.kind, str(self._base.resolve()), *self._names)


def _folder(folder: Path, kind: Kind) -> _Files:
    endings = PICTURES if kind == "image" else (".txt",)
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in endings)
    return _Files(found, kind, folder, folder)


class _Texts:
    """The lines of a file."""

    kind: Kind = "text"

    def __init__(self, texts: list[str], place: Path) -> None:
        if not texts:
            raise ValueError(f"input: got no texts in {place}, expected one on every line")
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def name(self, row: int) -> str:
        return self._texts[row]

    def read(self, row: int) -> str:
        return self._texts[row]

    def fingerprint(self) -> str:
        return _digest("texts", *self._texts)


class _Pairs:
    """The pictures or the captions of pairs, which are named as they are read."""

    def __init__(self, pairs: PairSource, kind: Kind, files: list[Path]) -> None:
        self.kind = kind
        self._pairs, self._files = pairs, files
        self._names: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, row: int) -> str:
        return self._names.pop(row, f"row {row}")  # once: those of a hundred million rows are not kept

    def read(self, row: int) -> bytes | str:
        pair = self._pairs.read(row)
        self._names[row] = pair.key if self.kind == "image" else pair.caption
        return pair.image if self.kind == "image" else pair.caption

    def fingerprint(self) -> str:
        return _digest("pairs", self.kind, *map(_facts, self._files))


class _Parquet:
    """A column of a Parquet file, read a row group at a time."""

    def __init__(self, path: Path, kind: Kind, column: str | None) -> None:
        self.kind = kind
        self._path = path
        self._file = open_parquet(path)
        import pyarrow.types as types

        schema = self._file.schema_arrow
        usual = _PICTURE_COLUMNS if kind == "image" else CAPTION_COLUMNS
        self._column = find_column(schema.names, column, usual, path)
        kind_of = schema.field(self._column).type
        self._is_text = types.is_string(kind_of) or types.is_large_string(kind_of)
        is_bytes = types.is_binary(kind_of) or types.is_large_binary(kind_of)
        if not (self._is_text or (is_bytes and kind == "image")):
            expected = "strings (paths) or binary (pictures)" if kind == "image" else "strings"
            raise ValueError(f"column: got {self._column!r} of {kind_of} in {path}, expected {expected}")
        groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]
        self._ends = np.cumsum(groups, dtype=np.int64)
        if not len(self._ends) or not self._ends[-1]:
            raise ValueError(f"input: got no rows in {path}, expected at least one")
        self._kept: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, row: int) -> str:
        return str(self._value(row)) if self._is_text else f"{self._path.name}/{row}"

    def read(self, row: int) -> bytes | str:
        value = self._value(row)
        if value is None:
            raise PairError(f"{self._path.name}/{row}: got nothing in the column {self._column!r}")
        if self.kind == "text" or not self._is_text:
            return value
        return (self._path.parent / value).read_bytes()

    def fingerprint(self) -> str:
        return _digest("parquet", self.kind, self._column, _facts(self._path))

    def _value(self, row: int) -> Any:
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:  # its files are not to be read by two threads
            if group not in self._kept:
                while len(self._kept) >= 2:
                    self._kept.pop(min(self._kept))
                self._kept[group] = self._file.read_row_group(group, columns=[self._column]).column(0)
            column = self._kept[group]
        return column[row - int(self._ends[group - 1] if group else 0)].as_py()


def _lines(path: Path) -> list[str]:
    return _decoded(path.read_bytes(), str(path), ValueError).splitlines()


def _decoded(data: bytes, name: str, error_type: Callable[[str], Exception] = PairError) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise error_type(f"{name}: got no UTF-8: {error}") from error


def _facts(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
