"""Files of features, read a chunk at a time: those that ``clipfast embed`` writes, and other programs' arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from clipfast.data.parquet import find_column, open_parquet
from clipfast.embed.writer import names_path


class Named(NamedTuple):
    """What a row is.

    Attributes:
        row: Its number in what was embedded.
        name: Its path or text; empty if the file has no names.
        caption: What its captions are, in lines; None where the file has none.
    """

    row: int
    name: str = ""
    caption: str | None = None


class FeatureFile(Protocol):
    """N rows of features.

    Attributes:
        width: Of a row.
    """

    width: int

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        """Yield all features, so many rows at a time: floats ``[n, E]``."""
        ...

    def names(self, places: list[int]) -> dict[int, Named]:
        """Return what the rows at some places are."""
        ...


def open_features(path: Path) -> FeatureFile:
    """Open a file of features.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is missing, for Parquet.
        ValueError: It is damaged, of another kind, or holds no features.
    """
    if path.suffix == ".npy":
        return _Array(path)
    if path.suffix == ".parquet":
        return _Table(path)
    raise ValueError(f"features: got {path}, expected a .npy or .parquet file")


class _Array:
    """An ``.npy`` array, and the names beside it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"features: got {path}, expected a file: there is none")
        try:
            self._values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"features: got {path}, expected a whole .npy array: {error}") from error
        if self._values.ndim != 2 or self._values.dtype.kind != "f" or not self._values.size:
            raise ValueError(
                f"features: got {self._values.dtype} {self._values.shape} in {path}, expected floats [n, E]"
            )
        self._path = path
        self.width = self._values.shape[1]

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        for first in range(0, len(self._values), rows):
            yield np.array(self._values[first : first + rows])

    def names(self, places: list[int]) -> dict[int, Named]:
        beside = names_path(self._path)
        if not beside.is_file():
            return {place: Named(place) for place in places}
        wanted = set(places)
        with beside.open(encoding="utf-8") as file:
            lines = islice(file, 1, None)  # the first says what the features depend on
            return {place: Named(*json.loads(line)) for place, line in enumerate(lines) if place in wanted}


class _Table:
    """A Parquet file with a column of features."""

    def __init__(self, path: Path) -> None:
        self._file = open_parquet(path)
        import pyarrow.types as types

        schema = self._file.schema_arrow
        find_column(schema.names, "features", (), path)
        kind = schema.field("features").type
        if not (types.is_fixed_size_list(kind) or types.is_list(kind)) or not types.is_floating(kind.value_type):
            raise ValueError(f"features: got a column of {kind} in {path}, expected lists of floats")
        if not self._file.metadata.num_rows:
            raise ValueError(f"features: got no rows in {path}, expected at least one")
        self._path = path
        self._columns = [name for name in ("row", "path", "text", "caption") if name in schema.names]
        self.width = kind.list_size if types.is_fixed_size_list(kind) else self._first_width()

    def _first_width(self) -> int:
        return len(next(self._batches(1, ["features"]))[0][0])

    def _batches(self, rows: int, columns: list[str]) -> Iterator[Any]:
        yield from self._file.iter_batches(batch_size=rows, columns=columns)

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        for batch in self._batches(rows, ["features"]):
            column = batch.column(0)
            flat = column.flatten().to_numpy(zero_copy_only=False)
            if column.null_count or len(flat) != len(column) * self.width:
                raise ValueError(f"features: got rows in {self._path} that are not of width {self.width}")
            yield flat.reshape(-1, self.width)

    def names(self, places: list[int]) -> dict[int, Named]:
        if not self._columns:
            return {place: Named(place) for place in places}
        wanted, found, first = sorted(places), {}, 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            here = [place for place in wanted if first <= place < first + count]
            if here:
                table = self._file.read_row_group(group, columns=self._columns)
                for place in here:
                    values = {name: table.column(name)[place - first].as_py() for name in self._columns}
                    name = values.get("path") or values.get("text") or ""
                    found[place] = Named(values.get("row", place), name, _in_lines(values.get("caption")))
            first += count
        return found


def _in_lines(captions: Any) -> str | None:
    """Return captions as lines: other programs' tables may hold lists of them."""
    if isinstance(captions, list):
        return "\n".join(caption for caption in captions if isinstance(caption, str)) or None
    return captions if isinstance(captions, str) else None
