"""Rows that are embedded, of pairs and of Parquet: a picture each, or a caption each where pictures have several."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clipfast.data.cache import cache_folder
from clipfast.data.captions import captions_of_value
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, PairError, PairSource
from clipfast.data.parquet import open_parquet
from clipfast.data.parquet_pairs import ParquetPictures, caption_column, picture_column
from clipfast.data.parquet_rows import ParquetRows
from clipfast.data.shard_index import LAYOUT
from clipfast.files import write_atomically

Kind = Literal["image", "text"]
# pairs whose captions are counted at once
_CHUNK = 4096


def of_pairs(pairs: PairSource, kind: Kind, options: DataOptions) -> PairPictures | CaptionRows:
    """Return the pictures of pairs, or all their captions."""
    # where rows are told otherwise than in an earlier version, features of then are not these
    parts = [*_chosen(options), *([pairs.identity] if pairs.identity else []), *map(facts_of, pairs.files)]
    fingerprint = digest_of("pairs", str(LAYOUT), kind, *parts)
    if kind == "image":
        return PairPictures(pairs, fingerprint)
    return CaptionRows(pairs.captions, pairs.key, len(pairs), fingerprint)


def of_parquet(paths: Sequence[Path], kind: Kind, options: DataOptions) -> PairPictures | CaptionRows | ParquetTexts:
    """Return the pictures or texts of a column of Parquet files.

    Raises:
        ImportError: pyarrow is missing.
        ValueError: There is no such column, or no rows.
    """
    schema = open_parquet(paths[0]).schema_arrow
    if kind == "image":
        column = picture_column(schema, options.image_column, paths[0])
    else:
        column = caption_column(schema, options.caption_column, paths[0])
    fingerprint = digest_of("parquet", kind, column.name, *map(facts_of, paths))
    if kind == "image":
        rows = _with_captions(paths, column.name, schema, options)
        return PairPictures(_Pictures(rows, ParquetPictures(rows, column)), fingerprint)
    rows = ParquetRows(paths, [column.name])
    if column.kind == "text":
        return ParquetTexts(rows, column.name, fingerprint)
    return CaptionRows(
        lambda row: captions_of_value(rows.value(row, column.name), column.name), rows.name, len(rows), fingerprint
    )


def in_lines(captions: Captions) -> str | None:
    """Return captions as lines; None where all are blank."""
    return "\n".join(text for text in captions.texts if text.strip()) or None


class PairPictures:
    """The pictures of pairs."""

    kind: Kind = "image"

    def __init__(self, pairs: PairSource | _Pictures, fingerprint: str) -> None:
        self._pairs, self._fingerprint = pairs, fingerprint

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        try:
            return self._pairs.key(row)
        except PairError:
            return f"row {row}"

    def read(self, row: int) -> bytes:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return self._pairs.image(row)

    def caption(self, row: int, content: bytes | str) -> str | None:
        """See :class:`clipfast.embed.reader.Inputs`; what cannot be read is none: the picture is what is embedded."""
        try:
            return in_lines(self._pairs.captions(row))
        except (PairError, OSError):
            return None

    def fingerprint(self) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return self._fingerprint


class _Pictures:
    def __init__(self, rows: ParquetRows, pictures: ParquetPictures) -> None:
        self._rows, self.key, self.image = rows, pictures.short_key, pictures.image

    def __len__(self) -> int:
        return len(self._rows)

    def captions(self, row: int) -> Captions:
        # the first column is the pictures'
        for name in self._rows.columns[1:]:
            return captions_of_value(self._rows.value(row, name), name)
        return Captions(("",))


class CaptionRows:
    """Every caption of N samples, in their order: a row is a caption.

    How many each has is counted by reading them once, and kept in the cache folder. What is no caption (null, a number,
    an empty text) is a row that cannot be read, so that it is counted and named.

    Args:
        captions: Reads those of a sample.
        name: Says where a sample is.
        count: N.
        fingerprint: Of the samples.
        by_place: Whether a row is called by its sample rather than by its text.
    """

    kind: Kind = "text"

    def __init__(
        self,
        captions: Callable[[int], Captions],
        name: Callable[[int], str],
        count: int,
        fingerprint: str,
        *,
        by_place: bool = False,
    ) -> None:
        self._captions, self._place, self._by_place = captions, name, by_place
        self._fingerprint = fingerprint
        self._ends = np.cumsum(self._counts(count))
        self._names: dict[int, str] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def name(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        # once: those of a hundred million rows are not kept
        return self._names.pop(row, None) or self._where(*self._sample(row))

    def read(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        sample, number = self._sample(row)
        texts, unusable = self._captions(sample)
        if number >= len(texts):
            which, reason = unusable[number - len(texts)] if number - len(texts) < len(unusable) else ("it", "changed")
            raise PairError(f"{self._where(sample, 0)}, {which}: {reason}")
        if not texts[number].strip():
            raise PairError(f"{self._where(sample, 0)}: its caption is empty")
        if not self._by_place:
            self._names[row] = texts[number]
        return texts[number]

    def caption(self, row: int, content: bytes | str) -> str | None:
        """See :class:`clipfast.embed.reader.Inputs`: the text, where a row is not called by it."""
        return str(content) if self._by_place else None

    def fingerprint(self) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return digest_of("captions", self._fingerprint)

    def _sample(self, row: int) -> tuple[int, int]:
        sample = int(np.searchsorted(self._ends, row, side="right"))
        return sample, row - (int(self._ends[sample - 1]) if sample else 0)

    def _where(self, sample: int, number: int) -> str:
        try:
            return self._place(sample) + (f":{number + 1}" if number else "")
        except PairError:
            return f"sample {sample}"

    def _counts(self, count: int) -> np.ndarray:
        kept = None
        with contextlib.suppress(OSError, ValueError, EOFError):
            kept = cache_folder() / f"captions-{self._fingerprint[:32]}.npy"
            found = np.load(kept, allow_pickle=False)
            if found.shape == (count,) and found.dtype == np.int64:
                return found
        with ThreadPoolExecutor(4) as pool:
            chunks = range(0, count, _CHUNK)
            counts = [
                number
                for first in chunks
                for number in pool.map(self._count, range(first, min(first + _CHUNK, count)), chunksize=64)
            ]
        found = np.array(counts, dtype=np.int64)
        if kept is not None:
            buffer = io.BytesIO()
            np.save(buffer, found)
            with contextlib.suppress(OSError):
                write_atomically(kept, lambda file: file.write(buffer.getvalue()))
        return found

    def _count(self, sample: int) -> int:
        try:
            texts, unusable = self._captions(sample)
            return len(texts) + len(unusable)
        except (PairError, OSError):
            return 1  # reading it says why


def _with_captions(paths: Sequence[Path], pictures: str, schema: Any, options: DataOptions) -> ParquetRows:
    """Open a column of pictures, and that of their captions beside it where all files have one."""
    try:
        captions = caption_column(schema, options.caption_column, paths[0]).name
        return ParquetRows(paths, [pictures, captions])
    except ValueError:
        if options.caption_column:
            raise
        return ParquetRows(paths, [pictures])


class ParquetTexts:
    """A column of texts."""

    kind: Kind = "text"

    def __init__(self, rows: ParquetRows, column: str, fingerprint: str) -> None:
        self._rows, self._column, self._fingerprint = rows, column, fingerprint

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        value = self._rows.value(row, self._column)
        return self._rows.name(row) if value is None else value

    def read(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        value = self._rows.value(row, self._column)
        if value is None:
            raise PairError(f"{self._rows.name(row)}: got nothing in the column {self._column!r}")
        return value

    def caption(self, row: int, content: bytes | str) -> str | None:
        """See :class:`clipfast.embed.reader.Inputs`: a row is called by its text."""
        return None

    def fingerprint(self) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return self._fingerprint


def facts_of(path: Path) -> str:
    """Return what tells a file from another, and from itself when it was rewritten."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def digest_of(*parts: str) -> str:
    """Return a digest of texts, those too that are names of files and no UTF-8."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _chosen(options: DataOptions) -> Iterable[str]:
    usual: dict[str, Any] = asdict(DataOptions())
    # how pictures are read is noted by itself: it does not say which rows there are
    values = {name: value for name, value in asdict(options).items() if name not in options.of_pictures()}
    return (f"{name}={value}" for name, value in values.items() if value != usual[name])
