"""Features in files: parts of fixed rows that are each whole or not there, then one file of all.

A run that was killed goes on with the parts that are missing. A part's batches begin at fixed rows, so that its bits
do not depend on where the run before was stopped.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipfast.data.parquet import require_pyarrow
from clipfast.files import write_atomically
from clipfast.outputs import check_output_file

FORMAT = "clipfast.features.1"
ENDINGS = (".parquet", ".npy")
DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class Part:
    """The features of a range of rows.

    Attributes:
        features: float32 or float16 ``[n, E]``.
        rows: int64 ``[n]``, their numbers in the input, ascending.
        names: Their n names.
        captions: What each one's captions are, in lines; None where there is none.
        skipped: ``(row, name, reason)`` of those that could not be read.
    """

    features: np.ndarray
    rows: np.ndarray
    names: list[str]
    captions: list[str | None]
    skipped: list[tuple[int, str, str]]


def names_path(output: Path) -> Path:
    """Where the names of an ``.npy``'s rows are: ``features.npy.names.jsonl`` beside ``features.npy``."""
    return output.with_name(output.name + ".names.jsonl")


def skipped_path(output: Path) -> Path:
    """Where the rows are listed that could not be read: ``features.npy.skipped.jsonl``, of this output alone."""
    return output.with_name(output.name + ".skipped.jsonl")


class PartStore:
    """The parts of a run beside its output, in ``OUTPUT.parts``.

    Args:
        output: The ``.parquet`` or ``.npy`` file that they become.
        about: What the features depend on; parts of anything else are not taken over.
        part_rows: Rows a part.
        total: Rows in all.

    Raises:
        ImportError: pyarrow is missing, for Parquet.
        OSError: The folder cannot be written.
        ValueError: Parts of another run are there.
    """

    def __init__(self, output: Path, about: dict[str, Any], part_rows: int, total: int) -> None:
        self.output, self.about, self.part_rows, self.total = output, about, part_rows, total
        self.folder = output.with_name(output.name + ".parts")
        manifest = self.folder / "manifest.json"
        expected = json.loads(json.dumps(about | {"part_rows": part_rows, "total": total}))
        if manifest.is_file():
            found = json.loads(manifest.read_text(encoding="utf-8"))
            # where the model lies does not change what it computes
            keys = (found.keys() | expected.keys()) - {"model"}
            changed = sorted(key for key in keys if found.get(key) != expected.get(key))
            if changed:
                raise ValueError(
                    f"output: got parts of another run in {self.folder} ({', '.join(changed)} changed), expected the "
                    f"same: give its arguments, another output, or --restart"
                )
        else:
            write_atomically(manifest, lambda file: file.write(json.dumps(expected, indent=1).encode()))
        # what was being written when a run was killed
        for path in (self.folder / "*.npz", output, names_path(output), skipped_path(output)):
            name = path.name if path.parent == self.folder else glob.escape(path.name)
            for left in path.parent.glob(f"{name}.????????.part"):
                left.unlink(missing_ok=True)

    @property
    def ranges(self) -> list[range]:
        """The rows of every part."""
        return [range(first, min(first + self.part_rows, self.total)) for first in range(0, self.total, self.part_rows)]

    def missing(self) -> list[range]:
        """The rows of the parts that are not there yet."""
        return [rows for rows in self.ranges if not self._path(rows).is_file()]

    def write(self, rows: range, part: Part) -> None:
        """Write one part, whole or not at all."""
        about = json.dumps({"names": part.names, "captions": part.captions, "skipped": part.skipped}).encode()

        def save(file: BinaryIO) -> None:
            np.savez(file, features=part.features, rows=part.rows, about=np.frombuffer(about, np.uint8))

        write_atomically(self._path(rows), save)

    def parts(self) -> Iterator[Part]:
        """Read all parts in order, one at a time."""
        for rows in self.ranges:
            with np.load(self._path(rows), allow_pickle=False) as kept:
                about = json.loads(kept["about"].tobytes())
                skipped = [tuple(entry) for entry in about["skipped"]]
                names = about["names"]
                # parts of earlier versions have no captions
                captions = about.get("captions") or [None] * len(names)
                yield Part(kept["features"], kept["rows"], names, captions, skipped)

    def join(self) -> tuple[int, list[tuple[int, str, str]]]:
        """Make the output of the parts, then remove them; returns the number of its rows, and what was skipped.

        Raises:
            ValueError: No row could be read.
        """
        count, width, captioned = 0, 0, False
        skipped: list[tuple[int, str, str]] = []
        for part in self.parts():
            count += len(part.rows)
            width = max(width, part.features.shape[1])
            captioned = captioned or any(part.captions)
            skipped += part.skipped
        if not count:
            # nothing in the parts is worth going on from, and they would stand in the way of other arguments
            shutil.rmtree(self.folder)
            raise ValueError(
                f"source: got no row that could be read, expected at least one; the first: {skipped[0][2]}"
            )
        about = self.about | {"format": FORMAT, "count": count, "width": width}
        if skipped:
            lines = (json.dumps({"row": row, "name": name, "reason": reason}) for row, name, reason in skipped)
            text = "\n".join(lines) + "\n"
            write_atomically(skipped_path(self.output), lambda file: file.write(text.encode()))
        else:
            skipped_path(self.output).unlink(missing_ok=True)
        if self.output.suffix == ".npy":
            # the names first: an .npy that is there has its names beside it
            write_atomically(names_path(self.output), lambda file: _write_names(self, about, file))
            write_atomically(self.output, lambda file: _write_npy(self, count, width, file))
        else:
            write_atomically(self.output, lambda file: _write_parquet(self, about, width, captioned, file))
        shutil.rmtree(self.folder)
        return count, skipped

    def _path(self, rows: range) -> Path:
        return self.folder / f"{rows.start:012d}.npz"


def remove_run(output: Path) -> None:
    """Remove an output and the parts of a run that was to make it."""
    for path in (output, names_path(output), skipped_path(output)):
        path.unlink(missing_ok=True)
    parts = output.with_name(output.name + ".parts")
    if (parts / "manifest.json").is_file():
        shutil.rmtree(parts)


def read_skipped(output: Path) -> list[tuple[int, str, str]]:
    """Return ``(row, name, reason)`` of the rows that a run left out."""
    path = skipped_path(output)
    if not path.is_file():
        return []
    entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(entry["row"], entry["name"], entry["reason"]) for entry in entries]


def read_about(output: Path) -> dict[str, Any]:
    """Return what the features of a file depend on, as the run wrote it; empty for files of other programs.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or has another ending.
    """
    if output.suffix == ".parquet":
        from clipfast.data.parquet import open_parquet

        metadata = open_parquet(output).schema_arrow.metadata or {}
        return json.loads(metadata.get(b"clipfast", b"{}"))
    if output.suffix != ".npy":
        raise ValueError(f"features: got {output}, expected a .parquet or .npy file")
    if not output.is_file():
        raise FileNotFoundError(f"features: got {output}, expected a file: there is none")
    names = names_path(output)
    if not names.is_file():
        return {}
    with names.open(encoding="utf-8") as file:
        first = file.readline()
    return json.loads(first) if first.startswith("{") else {}


def _write_names(store: PartStore, about: dict[str, Any], file: BinaryIO) -> None:
    file.write(json.dumps(about).encode() + b"\n")
    for part in store.parts():
        for row, name, caption in zip(part.rows.tolist(), part.names, part.captions, strict=True):
            file.write(json.dumps([row, name] if caption is None else [row, name, caption]).encode() + b"\n")


def _write_npy(store: PartStore, count: int, width: int, file: BinaryIO) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(store.about["dtype"])), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"shape": (count, width)})
    for part in store.parts():
        file.write(np.ascontiguousarray(part.features).tobytes())


def _write_parquet(store: PartStore, about: dict[str, Any], width: int, captioned: bool, file: BinaryIO) -> None:
    pyarrow, parquet = require_pyarrow()
    value = pyarrow.from_numpy_dtype(store.about["dtype"])
    column = "path" if store.about["kind"] == "image" else "text"
    words = (column, "caption") if captioned else (column,)
    schema = pyarrow.schema(
        [
            ("row", pyarrow.int64()),
            *((name, pyarrow.string()) for name in words),
            ("features", pyarrow.list_(value, width)),
        ],
        metadata={"clipfast": json.dumps(about)},
    )
    # features are noise to a compressor
    with parquet.ParquetWriter(file, schema, compression=dict.fromkeys(("row", *words), "snappy")) as writer:
        for part in store.parts():
            if len(part.rows):
                flat = pyarrow.array(np.ascontiguousarray(part.features).reshape(-1), type=value)
                features = pyarrow.FixedSizeListArray.from_arrays(flat, width)
                texts = [pyarrow.array([_in_utf8(name) for name in part.names], pyarrow.string())]
                if captioned:
                    texts.append(pyarrow.array([_in_utf8(caption) for caption in part.captions], pyarrow.string()))
                arrays = [pyarrow.array(part.rows), *texts, features]
                writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _in_utf8(text: str | None) -> str | None:
    """Return a text that Parquet can hold: lone surrogates, as in names that are not UTF-8, are spelt out."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()


def check_features_output(output: Path) -> None:
    """Find out whether a file of features can be written; nothing is made yet.

    Raises:
        ImportError: pyarrow is missing, for Parquet.
        OSError: It is a folder, or its folder can neither be written to nor made.
        ValueError: Its name ends otherwise.
    """
    check_output_file(output, ENDINGS)
    if output.suffix == ".parquet":
        require_pyarrow()
