"""Pairs in Parquet files: a row is a picture (its bytes, its path, or Hugging Face's struct of both) and captions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clipfast.data.captions import FIELDS_OF_SENTENCES, captions_of_value
from clipfast.data.options import DataOptions, usual_name
from clipfast.data.pairs import Captions, PairError, Pairs
from clipfast.data.parquet import find_column, open_parquet
from clipfast.data.parquet_rows import ParquetRows
from clipfast.data.places import find_base, read_picture, refuse_urls
from clipfast.data.table_pairs import CAPTION_COLUMNS, PATH_COLUMNS

PICTURE_COLUMNS = (*PATH_COLUMNS, "bytes", "jpg", "png", "jpeg", "webp", "img")


class ParquetColumn(NamedTuple):
    """A column of pictures or texts.

    Attributes:
        name: Of the column.
        kind: ``"path"``, ``"bytes"`` or ``"struct"`` of pictures; ``"text"`` or ``"list"`` of captions.
    """

    name: str
    kind: str


def picture_column(schema: Any, wanted: str | None, path: Path) -> ParquetColumn:
    """Find the column with pictures.

    Raises:
        ValueError: There is none, or it holds something else.
    """
    name = find_column(schema.names, wanted, _embedded_first(schema), path)
    kind = _value_type(schema.field(name).type)
    import pyarrow.types as types

    if types.is_struct(kind) and {field.name for field in kind} & {"bytes", "path"}:
        return ParquetColumn(name, "struct")
    if _is_text(kind):
        return ParquetColumn(name, "path")
    if _is_bytes(kind):
        return ParquetColumn(name, "bytes")
    raise ValueError(
        f"column: got {name!r} of {kind} in {path}, expected strings (paths), binary (pictures), or structs of bytes "
        f"and path"
    )


def caption_column(schema: Any, wanted: str | None, path: Path) -> ParquetColumn:
    """Find the column with captions: strings, lists of strings, or structs with ``raw``, ``caption`` or ``text``.

    Raises:
        ValueError: There is none, or it holds something else.
    """
    name = find_column(schema.names, wanted, CAPTION_COLUMNS, path)
    kind = _value_type(schema.field(name).type)
    if _is_text(kind):
        return ParquetColumn(name, "text")
    if _is_text(_innermost(kind)):
        return ParquetColumn(name, "list")
    raise ValueError(f"column: got {name!r} of {kind} in {path}, expected strings or lists of strings")


def _innermost(kind: Any) -> Any:
    """Return what lists, and structs of sentences, are made of in the end."""
    import pyarrow.types as types

    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _innermost(_value_type(kind.value_type))
    if types.is_struct(kind):
        texts = [_value_type(field.type) for field in kind if field.name in FIELDS_OF_SENTENCES]
        return _innermost(texts[0]) if texts else kind
    return kind


def has_pairs(path: Path, options: DataOptions) -> bool:
    """Whether a Parquet file has pictures and captions, by its columns.

    Raises:
        ImportError: pyarrow is missing.
    """
    try:
        schema = open_parquet(path).schema_arrow
        picture_column(schema, options.image_column, path)
        caption_column(schema, options.caption_column, path)
    except (ValueError, OSError):
        return False
    return True


def _embedded_first(schema: Any) -> Sequence[str]:
    """Order the usual names: pictures that are in the file count before paths of others."""
    there = [(usual, usual_name(schema.names, [usual])) for usual in PICTURE_COLUMNS]
    embedded = [usual for usual, name in there if name and not _is_text(_value_type(schema.field(name).type))]
    return embedded or PICTURE_COLUMNS


def _value_type(kind: Any) -> Any:
    return getattr(kind, "value_type", kind) if str(kind).startswith("dictionary") else kind


def _is_text(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_bytes(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view") or str(kind).startswith("fixed_size_binary")


class ParquetPictures:
    """The pictures of a column: bytes, paths, or structs of both as Hugging Face's datasets have them.

    Args:
        rows: Of the files, with the column.
        column: Its name and kind.

    Raises:
        ValueError: The paths are URLs, or lie in several places.
    """

    def __init__(self, rows: ParquetRows, column: ParquetColumn) -> None:
        self._rows, self._column = rows, column
        self._bases: dict[Path, Path] = {}
        self._one_folder = len({path.parent for path in rows.paths}) == 1
        if column.kind == "path":
            first = list(self._first_paths(20))
            refuse_urls(first, f"the column {column.name!r} of {rows.paths[0]}")
            near = rows.paths[0].parent
            base = find_base(near, first, [near.parent])
            if base != near:
                self._bases = dict.fromkeys({path.parent for path in rows.paths}, base)

    def _first_paths(self, count: int) -> Iterator[str]:
        for row in range(min(count, len(self._rows))):
            # a part of a file that is damaged is an error of its rows
            with contextlib.suppress(PairError):
                if value := self._rows.value(row, self._column.name):
                    yield value

    def short_key(self, row: int) -> str:
        """Return :meth:`key`; or a path as the column has it, where all files lie in one folder."""
        path = self._rows.value(row, self._column.name) if self._column.kind == "path" else None
        return path if path and self._one_folder else self.key(row)

    def key(self, row: int) -> str:
        """Return where a picture is: its path, or the file and its row where it is in there."""
        value = self._rows.value(row, self._column.name) if self._column.kind != "bytes" else None
        path = self._path(row, value)
        return self._rows.name(row) if path is None else str(path)

    def image(self, row: int) -> bytes:
        """Return a picture's bytes.

        Raises:
            PairError: There is none, or its file cannot be read.
        """
        value = self._rows.value(row, self._column.name)
        path = self._path(row, value)
        if path is not None:
            try:
                return read_picture(path)
            except OSError as error:
                raise PairError(f"{path}: {error}") from error
        if isinstance(value, dict):
            value = value.get("bytes")
        if value is None:
            raise PairError(f"{self._rows.name(row)}: got nothing in the column {self._column.name!r}")
        return value

    def _path(self, row: int, value: Any) -> Path | None:
        """Return the file that a value names, if its bytes are not here."""
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else None
        if not isinstance(value, str) or not value:
            return None
        folder = self._rows.folder(row)
        return self._bases.get(folder, folder) / value


class ParquetPairs(Pairs):
    """The pairs of Parquet files; see :func:`clipfast.data.sources.open_pairs`."""

    def __init__(self, paths: Sequence[Path], options: DataOptions | None = None) -> None:
        options = options or DataOptions()
        schema = open_parquet(paths[0]).schema_arrow
        picture = picture_column(schema, options.image_column, paths[0])
        caption = caption_column(schema, options.caption_column, paths[0])
        self._rows = ParquetRows(paths, [picture.name, caption.name])
        self._pictures = ParquetPictures(self._rows, picture)
        self._caption = caption.name
        self.files = self._rows.paths
        self.repeats = picture.kind != "bytes"
        self.groups = self._rows.groups.tolist()
        self.together = self._rows.together

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return self._pictures.key(index)

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return self._pictures.image(index)

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        try:
            return captions_of_value(self._rows.value(index, self._caption), self._caption)
        except PairError as error:
            raise PairError(f"{self._rows.name(index)}: {error}") from error
