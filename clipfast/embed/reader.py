"""What is embedded: pictures or texts by number, from a folder, a list, Parquet, shards or a table."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from clipfast.data.captions import captions_of_text
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, PairError
from clipfast.data.patterns import find_parquet, find_shards
from clipfast.data.pictures import PICTURES
from clipfast.data.sources import is_table, layouts_of_folder, open_pairs
from clipfast.embed.rows import CaptionRows, Kind, digest_of, of_pairs, of_parquet

KINDS = ("image", "text")
_EXPECTED = "a folder, a .txt list, .parquet, .tar shards, a .csv or .tsv table, or annotations"


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


def open_inputs(
    path: str | os.PathLike[str],
    kind: Kind = "image",
    column: str | None = None,
    options: DataOptions | None = None,
) -> Inputs:
    """Find what is to be embedded.

    Args:
        path: One of

            - a folder of pictures, also in folders below it, in the order of their paths; of ``.txt`` files for texts;
            - a ``.txt`` list: a picture's path, relative to the list, or a text on every line;
            - ``.parquet`` files (one, a pattern, or a folder of them) with a column of paths (relative to the file), of
              pictures' bytes, of Hugging Face's structs of both, or of texts;
            - shards, a table or annotations as for :func:`clipfast.data.sources.open_pairs`: the pictures, or all
              captions.
        kind: ``"image"`` or ``"text"``.
        column: Of a table or of Parquet, as ``image_column`` or ``caption_column`` of the options.
        options: What is the picture and what the caption, where the usual names do not say it.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ImportError: pyarrow is missing, for Parquet.
        ValueError: Nothing is there, or the column is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected 'image' or 'text'")
    options = options or DataOptions()
    if column:
        options = replace(options, **{"image_column" if kind == "image" else "caption_column": column})
    text = os.fspath(path)
    place = Path(text)
    if find_shards(text):
        return of_pairs(open_pairs(text, options), kind, options)
    if place.is_dir():
        return _folder(place, kind, options)
    if parquet := find_parquet(text):
        return of_parquet(parquet, kind, options)
    if not place.is_file():
        raise FileNotFoundError(f"input: got {text}, expected {_EXPECTED}: none is there")
    ending = place.suffix.lower()
    if ending in (".csv", ".tsv", ".json", ".token") or (ending == ".txt" and is_table(place, options)):
        return of_pairs(open_pairs(text, options), kind, options)
    if ending == ".txt":
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

    def captions(self, row: int) -> Captions:
        return captions_of_text(str(self.read(row)))

    def fingerprint(self) -> str:
        return digest_of("files", self.kind, str(self._base.resolve()), *self._names)


def _folder(folder: Path, kind: Kind, options: DataOptions) -> Inputs:
    endings = PICTURES if kind == "image" else (".txt",)
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in endings)
    if kind == "text" or not found:
        # annotations, a table or Parquet say what the texts are, and may hold the pictures
        if any(layout.listed for layout in layouts_of_folder(folder, options)):
            return of_pairs(open_pairs(folder, options), kind, options)
        if not found and (parquet := find_parquet(str(folder))):
            return of_parquet(parquet, kind, options)
    files = _Files(found, kind, folder, folder)
    if kind == "image":
        return files
    return CaptionRows(files.captions, files.name, len(files), files.fingerprint(), by_place=True)


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
        return digest_of("texts", *self._texts)


def _lines(path: Path) -> list[str]:
    return _decoded(path.read_bytes(), str(path), ValueError).splitlines()


def _decoded(data: bytes, name: str, error_type: Callable[[str], Exception] = PairError) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise error_type(f"{name}: got no UTF-8: {error}") from error
