"""Rows of Parquet files by number, read a row group at a time.

A row group is what lies together, so only as many of them are shuffled together as every reading process can hold.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from clipfast.data.pairs import PairError
from clipfast.data.parquet import find_column, open_parquet, require_pyarrow
from clipfast.data.shard_index import identity
from clipfast.data.shards import shard_names

# bytes of decoded row groups that a process holds, and open files
_HELD = 256 << 20
_LARGE = 1 << 30
_OPEN_FILES = 32


class ParquetRows:
    """Values of columns of many files by the numbers of their rows, which count through the files in their order.

    Args:
        paths: The files.
        columns: What is read of each.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: A file is damaged, lacks a column, or there are no rows.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str]) -> None:
        self.paths, self.columns = list(paths), list(columns)
        self.names = shard_names(self.paths)
        with ThreadPoolExecutor(8) as pool:
            facts = list(pool.map(self._facts, self.paths))
        self._identities = [found for found, _ in facts]
        places = [(file, group, rows, size) for file, (_, groups) in enumerate(facts) for group, rows, size in groups]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 4)
        self.groups = self._places[:, 2]
        self._ends = np.cumsum(self.groups)
        if not len(self):
            others = f" and {len(paths) - 1} files more" if len(paths) > 1 else ""
            raise ValueError(f"data: got no rows in {paths[0]}{others}, expected at least one")
        largest = int(self._places[:, 3].max())
        if largest > _LARGE:
            warnings.warn(
                f"data: {paths[0]} and its like have row groups of up to {largest / 2**30:.1f} GiB: every process that "
                f"reads holds one in memory; write them with fewer rows a group",
                stacklevel=3,
            )
        self._forget()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _facts(self, path: Path) -> tuple[tuple[int, ...], list[tuple[int, int, int]]]:
        file = open_parquet(path, mapped=False)
        schema = file.schema_arrow
        for name in self.columns:
            find_column(schema.names, name, (), path)
        groups = []
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            parts = (group.column(i) for i in range(group.num_columns))
            size = sum(p.total_uncompressed_size for p in parts if p.path_in_schema.split(".")[0] in self.columns)
            groups.append((number, group.num_rows, size))
        return identity(path), groups

    @property
    def together(self) -> int | None:
        """The most rows to shuffle together, so that the row groups that hold them fit into memory; None for all."""
        sizes = self._places[:, 3]
        if int(sizes.sum()) <= _HELD:
            return None
        a_row = max(1, int(sizes.sum()) // len(self))
        # a pool is whole groups, and may be one longer than asked for
        return max(1, _HELD // 2 // a_row - int(self.groups.max()))

    def name(self, row: int) -> str:
        """Where a row is: ``file.parquet/12`` by its number in the file."""
        file, first = self._first_of_file(row)
        return f"{self.names[file]}/{row - first}"

    def folder(self, row: int) -> Path:
        """The folder of a row's file."""
        return self.paths[self._first_of_file(row)[0]].parent

    def _first_of_file(self, row: int) -> tuple[int, int]:
        group = int(np.searchsorted(self._ends, row, side="right"))
        file = int(self._places[group, 0])
        first = int(np.searchsorted(self._places[:, 0], file))
        return file, int(self._ends[first - 1]) if first else 0

    def value(self, row: int, column: str) -> Any:
        """Return one value, with its row group read if it is not held.

        Raises:
            PairError: The file is gone, was changed, or this part of it is damaged.
        """
        group = int(np.searchsorted(self._ends, row, side="right"))
        with self._lock:  # a file is not to be read by two threads
            table = self._held.get(group)
            if table is None:
                table = self._read(group)
                sizes = self._places[:, 3]
                while self._held and sum(int(sizes[held]) for held in self._held) + int(sizes[group]) > _HELD:
                    self._held.popitem(last=False)
                self._held[group] = table
            self._held.move_to_end(group)
        return table.column(column)[row - int(self._ends[group]) + int(self.groups[group])].as_py()

    def _read(self, group: int) -> Any:
        file, number = int(self._places[group, 0]), int(self._places[group, 1])
        path = self.paths[file]
        pyarrow, _ = require_pyarrow()
        try:
            if file not in self._files:
                self._check(file)
                while len(self._files) >= _OPEN_FILES:
                    self._files.popitem(last=False)
                self._files[file] = open_parquet(path, mapped=False)
            self._files.move_to_end(file)
            return self._files[file].read_row_group(number, columns=self.columns, use_threads=False)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if isinstance(error, PairError):
                raise
            reason = str(error).splitlines()[0]
            raise PairError(f"{path}: row group {number} cannot be read: {reason}") from error

    def _check(self, file: int) -> None:
        """Read a file anew that was rewritten, unless the number of its rows changed."""
        path = self.paths[file]
        if identity(path) == self._identities[file]:
            return
        found, groups = self._facts(path)
        if [rows for _, rows, _ in groups] != self.groups[self._places[:, 0] == file].tolist():
            raise PairError(f"{path}: it changed since its rows were counted")
        self._identities[file] = found

    def _forget(self) -> None:
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._held: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_files", "_held", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()
