"""Pictures with a class each: folders of classes, WebDataset shards, and digits that a library ships."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from clipfast.data.folder_pairs import caption_endings, with_captions
from clipfast.data.options import DataOptions
from clipfast.data.pairs import PairError
from clipfast.data.patterns import find_shards
from clipfast.data.pictures import PICTURES, is_picture
from clipfast.data.places import read_picture
from clipfast.data.shard_index import ShardSample, find_part, identity, scan_shard
from clipfast.data.shards import shard_names
from clipfast.data.sources import layouts_of_folder
from clipfast.data.text_files import read_text, split_lines
from clipfast.data.walk import files_below, tell_left_out
from clipfast.extras import missing

_CLASS_FILES = ("classnames.txt", "classes.txt")


class LabelledSource(Protocol):
    """N pictures, read by number.

    Attributes:
        class_names: C names, as prompts say them.
        labels: N indices into them.
    """

    class_names: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        """Return N."""
        ...

    def name(self, index: int) -> str:
        """What to call picture ``index``."""
        ...

    def read(self, index: int) -> bytes | Image.Image:
        """Read picture ``index``: the bytes of its file, or itself.

        Raises:
            PairError, OSError: It cannot be read.
        """
        ...


def open_labelled(
    path: str | os.PathLike[str],
    class_names: str | os.PathLike[str] | Sequence[str] | None = None,
    encoding: str | None = None,
) -> LabelledSource:
    """Find pictures with classes.

    Args:
        path: One of

            - a folder with a folder for each class, pictures in it or below (torchvision's ImageFolder). The classes
              are the folders in the order of their names, ``_`` read as a blank;
            - WebDataset shards, named as for :func:`clipfast.data.sources.open_pairs`: a picture and its class'
              number in a ``.cls``, the names in a ``classnames.txt`` beside them or one folder up (clip-benchmark's
              layout);
            - ``digits``: the 1,797 pictures of handwritten digits that scikit-learn ships.
        class_names: The names in the order of the numbers or folders, or a file with them: one a line (or a JSON
            list) in that order, or a JSON object of names by folder.
        encoding: Of files of names; None is UTF-8.

    Raises:
        FileNotFoundError: A file or folder is missing.
        ImportError: scikit-learn is missing.
        ValueError: No pictures, no names, or names that do not fit.
    """
    text = os.fspath(path)
    if isinstance(class_names, (str, os.PathLike)):
        names: Sequence[str] | dict[str, str] | None = _read_names(Path(class_names), encoding)
    else:
        names = class_names
    shards = find_shards(text)
    if shards:
        return ShardClasses(shards, names, encoding)
    if text == "digits" and not Path(text).exists():
        return Digits(names)
    place = Path(text)
    if not place.is_dir():
        raise FileNotFoundError(f"data: got {text}, expected shards, 'digits', or a folder of classes: none is there")
    return FolderClasses(place, names)


def has_labels(path: str, options: DataOptions | None = None) -> bool:
    """Whether ``path`` names pictures with classes, rather than with captions.

    Raises:
        FileNotFoundError, ValueError: As :func:`clipfast.data.patterns.find_shards`.
    """
    shards = find_shards(path)
    for shard in shards:
        if samples := scan_shard(shard)[0]:
            return any(extension == "cls" for extension, _, _ in samples[0].parts)
    if shards:
        return False
    place = Path(path)
    if not place.is_dir():
        return path == "digits" and not place.exists()
    options = options or DataOptions()
    if any(layout.listed for layout in layouts_of_folder(place, options)):
        return False
    below = files_below(place, (*PICTURES, *caption_endings(options)))
    pictures = [name for name in below.files if is_picture(name)]
    # a stray text beside one of a million pictures makes no captions of them
    captioned = 2 * len(with_captions(below, options)) >= len(pictures)
    return not captioned and any("/" in name for name in pictures)


class FolderClasses:
    """The pictures of a folder of classes; see :func:`open_labelled`."""

    def __init__(self, folder: Path, names: Sequence[str] | dict[str, str] | None = None) -> None:
        below = files_below(folder, PICTURES)
        here = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        folders = [name for name in here if name not in below.circles]
        if not folders:
            raise ValueError(f"data: got no folders in {folder}, expected one for each class, with its pictures")
        self.class_names = _fitting_names(names, folders, folder)
        label_of = {name: label for label, name in enumerate(folders)}
        pictures = [name for name in below.ordered() if name.partition("/")[0] in label_of and "/" in name]
        if not pictures:
            raise ValueError(f"data: got no pictures in the folders of {folder}, expected {', '.join(PICTURES)}")
        outside = len(below.files) - len(pictures)
        words = f"{outside} pictures that are in no class' folder" if outside else ""
        tell_left_out(folder, below, besides=(".txt", ".json"), more=words)
        self._paths = [folder / name for name in pictures]
        self.labels = [label_of[name.partition("/")[0]] for name in pictures]

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """See :class:`LabelledSource`."""
        return str(self._paths[index])

    def read(self, index: int) -> bytes:
        """See :class:`LabelledSource`."""
        return read_picture(self._paths[index])


class ShardClasses:
    """The pictures of shards with a ``.cls`` each; see :func:`open_labelled`."""

    def __init__(
        self,
        shards: Sequence[Path],
        names: Sequence[str] | dict[str, str] | None = None,
        encoding: str | None = None,
    ) -> None:
        if names is None:
            names = _names_beside(shards[0], encoding)
        if isinstance(names, dict):
            raise ValueError("class_names: got names by folder, expected a list: shards have numbers for classes")
        self.class_names = list(names)
        self._shards, self._names = list(shards), shard_names(shards)
        self._identities = [identity(shard) for shard in shards]
        self._samples: list[tuple[int, ShardSample]] = []
        self.labels: list[int] = []
        for number, shard in enumerate(shards):
            samples, problem = scan_shard(shard)
            if problem:
                words = f"data: a shard is broken, what is whole of it is used: {shard}: {problem}"
                warnings.warn(words, stacklevel=3)
            with shard.open("rb") as file:
                for sample in samples:
                    if sample.problem:
                        raise ValueError(f"data: {shard}: {sample.key}: {sample.problem}")
                    part = find_part(sample, ["cls"])
                    if part is None or part[1] < 0:
                        raise ValueError(
                            f"data: got {sample.extensions} for {sample.key} in {shard}, expected a .cls with its class"
                        )
                    file.seek(part[1])
                    self.labels.append(self._label(file.read(part[2]), sample.key, shard))
                    self._samples.append((number, sample))
        if not self._samples:
            raise ValueError(f"data: got no samples in {len(shards)} shards such as {shards[0]}")

    def __len__(self) -> int:
        return len(self._samples)

    def name(self, index: int) -> str:
        """See :class:`LabelledSource`."""
        shard, sample = self._samples[index]
        return f"{self._names[shard]}/{sample.key}"

    def read(self, index: int) -> bytes:
        """See :class:`LabelledSource`."""
        shard, sample = self._samples[index]
        path = self._shards[shard]
        # its classes are in memory; the last of an identity changes with a file's permissions too
        if identity(path)[:2] != self._identities[shard][:2]:
            raise PairError(f"{path}: it changed since its classes were read")
        part = find_part(sample, [suffix[1:] for suffix in PICTURES])
        if part is None or part[1] < 0:
            raise PairError(f"{self.name(index)}: got {sample.extensions}, expected a picture")
        with path.open("rb") as file:
            file.seek(part[1])
            return file.read(part[2])

    def _label(self, text: bytes, key: str, shard: Path) -> int:
        classes = len(self.class_names)
        try:
            label = int(text)
        except ValueError:
            label = -1
        if not 0 <= label < classes:
            raise ValueError(f"data: got class {text[:20]!r} of {key} in {shard}, expected a number 0 to {classes - 1}")
        return label


class Digits:
    """The handwritten digits of scikit-learn, dark on white; see :func:`open_labelled`."""

    def __init__(self, names: Sequence[str] | dict[str, str] | None = None) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise missing("data: 'digits' needs", "sklearn")
        from sklearn.datasets import load_digits

        found = load_digits()
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        self.class_names = _fitting_names(names, words, Path("digits"))
        self.labels = found.target.tolist()
        self._pictures = np.round(255 - found.images * (255 / 16)).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """See :class:`LabelledSource`."""
        return f"digits/{index}"

    def read(self, index: int) -> Image.Image:
        """See :class:`LabelledSource`."""
        return Image.fromarray(self._pictures[index])


def _read_names(path: Path, encoding: str | None = None) -> Sequence[str] | dict[str, str]:
    text = read_text(path, encoding)
    if path.suffix != ".json":
        return [line.strip() for line in split_lines(text) if line.strip()]
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"class_names: got {path}, expected JSON: {error}") from error
    values = list(names.values()) if isinstance(names, dict) else names
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"class_names: got {path}, expected a JSON list of names, or an object of them by folder")
    return names


def _names_beside(shard: Path, encoding: str | None = None) -> list[str]:
    for folder in (shard.parent, shard.parent.parent):
        for name in _CLASS_FILES:
            if (folder / name).is_file():
                return list(_read_names(folder / name, encoding))
    raise ValueError(
        f"class_names: got none for {shard}, expected a file of names, 'imagenet', or {_CLASS_FILES[0]} beside it"
    )


def _fitting_names(names: Sequence[str] | dict[str, str] | None, own: list[str], place: Path) -> list[str]:
    if names is None:
        return [name.replace("_", " ") for name in own]
    if isinstance(names, dict):
        missing = [name for name in own if name not in names]
        if missing:
            raise ValueError(f"class_names: got no name for {missing[0]!r} and {len(missing) - 1} more in {place}")
        return [names[name] for name in own]
    if len(names) != len(own):
        raise ValueError(f"class_names: got {len(names)} names, expected {len(own)}, one for each class of {place}")
    return list(names)
