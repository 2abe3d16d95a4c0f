"""What is embedded: pictures or texts by number, from a folder, a list, Parquet, shards or a table."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from clipfast.data.options import DataOptions
from clipfast.data.patterns import find_parquet, find_shards
from clipfast.data.pictures import PICTURES
from clipfast.data.shipped import is_shipped
from clipfast.data.sources import is_table, layouts_of_folder, open_pairs
from clipfast.data.table_pairs import TablePairs
from clipfast.data.walk import files_below
from clipfast.embed.lists import folder_files, open_list
from clipfast.embed.rows import CaptionRows, Kind, of_pairs, of_parquet
from clipfast.files import path_text

KINDS = ("image", "text")
_EXPECTED = "a folder, a .txt list, .parquet, .tar shards, a .csv or .tsv table, annotations, or 'emoji'"


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

    def caption(self, row: int, content: bytes | str) -> str | None:
        """Return what the data says of a row beside its name, a line for each caption; None where it says nothing.

        Args:
            row: Its number.
            content: What :meth:`read` gave.
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
    image_size: int | tuple[int, int] | None = None,
) -> Inputs:
    """Find what is to be embedded.

    Args:
        path: One of

            - a folder of pictures, also in folders below it and behind links, in the order of their paths; of ``.txt``
              files for texts;
            - a ``.txt`` list: a picture's path, relative to the list, or a text on every line; row i is line i + 1, and
              blank lines are rows that cannot be read;
            - ``.parquet`` files (one, a pattern, or a folder of them) with a column of paths (relative to the file), of
              pictures' bytes, of Hugging Face's structs of both, or of texts;
            - shards, a table or annotations as for :func:`clipfast.data.sources.open_pairs`: the pictures, or all
              captions; also ``emoji``, of which those that ``clipfast demo`` holds out, and ``scikit-image``.
        kind: ``"image"`` or ``"text"``.
        column: Of a table or of Parquet, as ``image_column`` or ``caption_column`` of the options.
        options: What is the picture and what the caption, where the usual names do not say it.
        image_size: Of the model: how large emoji are drawn.

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
    text = path_text(path, "source")
    place = Path(text)
    if is_shipped(text) or find_shards(text):
        return of_pairs(open_pairs(text, options, image_size=image_size), kind, options)
    if place.is_dir():
        return _folder(place, kind, options)
    if parquet := find_parquet(text):
        return of_parquet(parquet, kind, options)
    if not place.is_file():
        raise FileNotFoundError(f"source: got {text}, expected {_EXPECTED}: none is there")
    ending = place.suffix.lower()
    if ending in (".csv", ".tsv"):
        return of_pairs(TablePairs(place, options, ("image",) if kind == "image" else ("caption",)), kind, options)
    if ending in (".json", ".token") or (ending == ".txt" and is_table(place, options)):
        return of_pairs(open_pairs(text, options), kind, options)
    if ending == ".txt":
        return open_list(place, kind, options.encoding)
    raise ValueError(f"source: got {text}, expected {_EXPECTED}")


def _folder(folder: Path, kind: Kind, options: DataOptions) -> Inputs:
    if kind == "text" or not files_below(folder, PICTURES).files:
        # annotations, a table or Parquet say what the texts are, and may hold the pictures
        if any(layout.listed for layout in layouts_of_folder(folder, options)):
            return of_pairs(open_pairs(folder, options), kind, options)
        texts = kind == "text" and files_below(folder, (".txt",)).files
        if not texts and (parquet := find_parquet(str(folder))):
            return of_parquet(parquet, kind, options)
    files = folder_files(folder, kind, options)
    if kind == "image":
        return files
    return CaptionRows(files.captions, files.name, len(files), files.fingerprint(), by_place=True)
