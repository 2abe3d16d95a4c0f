"""Picture-caption pairs by number, wherever they lie: shards, tables, Parquet, annotations, folders."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from clipfast.data.coco_pairs import ANNOTATIONS, AnnotatedPairs
from clipfast.data.folder_pairs import FolderPairs, caption_endings, with_captions
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, Pair, PairError, PairSource
from clipfast.data.parquet_pairs import ParquetPairs, has_pairs
from clipfast.data.patterns import find_parquet, find_shards
from clipfast.data.pictures import PICTURES, ending_of, is_picture
from clipfast.data.shards import ShardedPairs
from clipfast.data.shipped import is_shipped, open_shipped
from clipfast.data.table_pairs import TABLES, TablePairs, table_layout
from clipfast.data.walk import Below, files_below

__all__ = ["Captions", "DataOptions", "Layout", "Pair", "PairError", "PairSource", "layouts_of_folder", "open_pairs"]

# a folder with more texts that belong to no picture is a collection of texts: no table is looked for in them
_MOST_TEXTS = 50


def open_pairs(
    path: str | os.PathLike[str],
    options: DataOptions | None = None,
    *,
    training: bool = False,
    image_size: int | tuple[int, int] | None = None,
) -> PairSource:
    """Find the pairs at a place.

    Args:
        path: One of

            - WebDataset shards: ``train-{000..123}.tar``, several such patterns joined by ``::``, or a folder with
              ``.tar`` files. A sample is a picture and captions: a ``.txt``'s lines, or ``caption`` in a ``.json``;
            - a ``.csv`` or ``.tsv`` table with a header: a column with the pictures' paths, relative to the table
              (``filepath``, ``image``, ``path``), and one with captions (``title``, ``caption``, ``text``);
            - Flickr's lists: ``name.jpg#0``, a tab and a caption; or ``captions.txt`` and ``results.csv`` of Kaggle;
            - Parquet: a file, a pattern of several, or a folder; with paths, bytes, or Hugging Face's structs of them;
            - COCO's ``captions_*.json``, or Karpathy's ``dataset_*.json``;
            - a folder of pictures, also in folders below it, each with a ``.txt`` or ``.json`` of the same name beside
              it; or a folder with one of the above;
            - ``emoji`` or ``scikit-image``, which packages bring (:func:`clipfast.data.shipped.open_shipped`), unless
              something here is called so.
        options: What is the picture and what the caption, where the usual names do not say it.
        training: Whether ``emoji`` are those to train on; else they are those that are held out.
        image_size: Of the model: how large emoji are drawn.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ImportError: pyarrow is missing, for Parquet, or a package that brings pairs.
        ValueError: No pairs are there, a table lacks a column, or a folder holds pairs of several kinds.
    """
    text = os.fspath(path)
    options = options or DataOptions()
    if is_shipped(text):
        return open_shipped(text, training=training, image_size=image_size)
    shards = find_shards(text)
    if shards:
        return ShardedPairs(shards, options)
    place = Path(text)
    if place.is_dir():
        return _open_folder(place, options)
    if parquet := find_parquet(text):
        return ParquetPairs(parquet, options)
    expected = "shards, a .csv, .tsv or .parquet table, COCO's .json, a folder, or 'emoji'"
    if not place.exists():
        raise FileNotFoundError(f"data: got {text}, expected {expected}: none is there")
    if place.suffix.lower() in TABLES:
        return TablePairs(place, options)
    if place.suffix.lower() == ".json":
        return AnnotatedPairs(place, options)
    raise ValueError(f"data: got {text}, expected {expected}")


class Layout(NamedTuple):
    """Pairs of one kind in a folder.

    Attributes:
        words: What they are.
        open: Opens them.
        listed: Whether a file says which pairs there are.
    """

    words: str
    open: Callable[[], PairSource]
    listed: bool = True


def layouts_of_folder(folder: Path, options: DataOptions | None = None) -> list[Layout]:
    """Tell by their content which pairs a folder holds; shards are not looked for.

    Raises:
        OSError: The folder cannot be read.
    """
    options = options or DataOptions()
    found: list[Layout] = []
    annotations = [path for top in (folder, folder / "annotations") for name in ANNOTATIONS for path in top.glob(name)]
    for path in sorted(annotations):
        found.append(Layout(f"annotations {path.relative_to(folder)}", lambda p=path: AnnotatedPairs(p, options)))
    below = files_below(folder, (*PICTURES, *caption_endings(options), *TABLES, ".parquet"))
    for path in _tables(folder, below):
        if is_table(path, options):
            found.append(Layout(f"a table {path.name}", lambda p=path: TablePairs(p, options)))
    beside = with_captions(below, options)
    parquet = [folder / name for name in below.ordered() if ending_of(name) == ".parquet"]
    if parquet and _is_of_pairs(parquet[0], options, alone=not any(map(is_picture, below.files))):
        found.append(Layout(f"Parquet {parquet[0].relative_to(folder)}", lambda: ParquetPairs(parquet, options)))
    if beside:
        words = "pictures with captions beside them"
        found.append(Layout(words, lambda: FolderPairs(folder, options, below), listed=False))
    return found


def _tables(folder: Path, below: Below) -> list[Path]:
    """Return the files in a folder itself that may be tables: no captions of a picture, no collection of texts."""
    files = [name for name in below.ordered() if "/" not in name]
    stems = {os.path.splitext(name)[0] for name in files if is_picture(name)}
    tables = [name for name in files if ending_of(name) in TABLES and os.path.splitext(name)[0] not in stems]
    texts = [name for name in tables if ending_of(name) == ".txt"]
    return [folder / name for name in tables if ending_of(name) != ".txt" or len(texts) <= _MOST_TEXTS]


def _is_of_pairs(path: Path, options: DataOptions, *, alone: bool) -> bool:
    try:
        return has_pairs(path, options)
    except ImportError:
        # img2dataset leaves Parquet beside pictures, which can be read without pyarrow
        return alone


def _open_folder(folder: Path, options: DataOptions) -> PairSource:
    found = layouts_of_folder(folder, options)
    if len(found) > 1:
        raise ValueError(
            f"data: got {folder}, which holds {', '.join(layout.words for layout in found[:4])}, expected pairs of one "
            f"kind: name the file"
        )
    # its own error says what is missing
    return found[0].open() if found else FolderPairs(folder, options)


def is_table(path: Path, options: DataOptions) -> bool:
    """Whether a text file's first line is that of a table of pictures and captions."""
    try:
        return table_layout(path, options) is not None
    except (OSError, ValueError):
        return False  # notes in another encoding, for one: no table, unless it is named
