"""Picture-caption pairs by number, wherever they lie: WebDataset shards, a table of paths, or a folder."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# the header of a table names its columns: open_clip's names first
PATH_COLUMNS = ("filepath", "image", "image_path", "path", "file")
CAPTION_COLUMNS = ("title", "caption", "text")


class Pair(NamedTuple):
    """One picture and its caption, as they are stored.

    Attributes:
        key: What to call the pair: a path, or ``shard.tar/key``.
        image: The bytes of the picture's file.
        caption: Its text.
    """

    key: str
    image: bytes
    caption: str


class PairError(ValueError):
    """A pair that cannot be read: its picture or its caption is missing or broken. The others can."""


class PairSource(Protocol):
    """N pairs, read by number.

    Attributes:
        groups: How many pairs lie together, in order: those of each shard, or all of them where none are closer than
            others.
    """

    groups: Sequence[int]

    def __len__(self) -> int:
        """Return N."""
        ...

    def read(self, index: int) -> Pair:
        """Read pair ``index``, 0 to N − 1.

        Raises:
            PairError: This pair cannot be read.
        """
        ...


def open_pairs(path: str | os.PathLike[str]) -> PairSource:
    """Find the pairs at a place.

    Args:
        path: One of

            - WebDataset shards: ``train-{000..123}.tar``, several such patterns joined by ``::``, or a folder with
              ``.tar`` files. A sample is a picture and a caption (``.txt``, or ``caption`` in a ``.json``);
            - a ``.csv`` or ``.tsv`` table with a header: a column with the pictures' paths, relative to the table
              (``filepath``, ``image``, ``path``), and one with captions (``title``, ``caption``, ``text``);
            - a folder of pictures, also in folders below it, each with a ``.txt`` of the same name beside it.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ValueError: No pairs are there, or a table lacks a column.
    """
    from clipfast.data.shards import ShardedPairs, expand_shards

    text = os.fspath(path)
    if "::" in text or "{" in text or text.endswith(".tar"):
        return ShardedPairs(expand_shards(text))
    place = Path(text)
    if not place.exists():
        raise FileNotFoundError(f"data: got {text}, expected shards, a .csv or .tsv table, or a folder: none is there")
    if place.is_file():
        if place.suffix.lower() not in (".csv", ".tsv"):
            raise ValueError(f"data: got {text}, expected .tar shards, a .csv or .tsv table, or a folder")
        return TablePairs(place)
    shards = sorted(place.glob("*.tar"))
    return ShardedPairs(shards) if shards else FolderPairs(place)


class _FilePairs:
    """Pairs of a picture's file and a caption that :meth:`_caption` finds."""

    def __init__(self, pictures: list[Path], place: Path) -> None:
        if not pictures:
            raise ValueError(f"data: got no pairs in {place}, expected at least one")
        self._pictures = pictures
        self.groups = (len(pictures),)

    def __len__(self) -> int:
        return len(self._pictures)

    def read(self, index: int) -> Pair:
        """See :class:`PairSource`."""
        path = self._pictures[index]
        try:
            return Pair(str(path), path.read_bytes(), self._caption(index))
        except (OSError, UnicodeDecodeError) as error:
            raise PairError(f"{path}: {error}") from error

    def _caption(self, index: int) -> str:
        raise NotImplementedError


class TablePairs(_FilePairs):
    """The pairs that a ``.csv`` or ``.tsv`` table lists; see :func:`open_pairs`."""

    def __init__(self, table: Path) -> None:
        with table.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
            header = rows.fieldnames or []
            path, caption = (_column(header, names, table) for names in (PATH_COLUMNS, CAPTION_COLUMNS))
            # a short row has None where it ends
            listed = [(row[path] or "", row[caption] or "") for row in rows]
        self._captions = [text for _, text in listed]
        super().__init__([table.parent / name for name, _ in listed], table)

    def _caption(self, index: int) -> str:
        return self._captions[index]


class FolderPairs(_FilePairs):
    """Pictures in a folder and those below it, each with a ``.txt`` beside it; see :func:`open_pairs`."""

    def __init__(self, folder: Path) -> None:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES)
        super().__init__([p for p in found if p.with_suffix(".txt").is_file()], folder)

    def _caption(self, index: int) -> str:
        return self._pictures[index].with_suffix(".txt").read_text(encoding="utf-8")


def _column(header: Sequence[str], names: Sequence[str], table: Path) -> str:
    for name in names:
        if name in header:
            return name
    raise ValueError(f"data: got the columns {', '.join(header) or 'none'} in {table}, expected one of {names}")
