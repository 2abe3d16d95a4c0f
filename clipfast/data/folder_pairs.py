"""Pairs of a folder: pictures, each with a file of captions beside it."""

from __future__ import annotations

import os
from pathlib import Path

from clipfast.data.captions import caption_files, captions_of_json, captions_of_text
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, PairError, Pairs
from clipfast.data.pictures import PICTURES
from clipfast.data.places import read_picture
from clipfast.data.text_files import read_text
from clipfast.data.walk import Below, files_below, tell_left_out


def caption_endings(options: DataOptions) -> tuple[str, ...]:
    """Return the endings of the files that captions may be in, in the order in which they are looked for."""
    return tuple(dict.fromkeys([*(f".{name}" for name in caption_files(options.caption_key)), ".json"]))


def with_captions(below: Below, options: DataOptions) -> list[tuple[str, str]]:
    """Return the pictures that have captions beside them, and the files of these, in the order of their paths.

    ``A.JPG`` has its captions in ``A.txt`` or ``A.TXT``; in ``A.json`` where there is neither.

    Args:
        below: All files of a folder, pictures and :func:`caption_endings`.
        options: For ``caption_key``.
    """
    pictures, endings = frozenset(PICTURES), caption_endings(options)
    texts: dict[tuple[str, str], str] = {}
    split = [os.path.splitext(name) for name in below.ordered()]
    for stem, ending in split:
        if ending.lower() in endings:
            texts.setdefault((stem, ending.lower()), stem + ending)
    found = []
    for stem, ending in split:
        if ending.lower() in pictures:
            text = next((texts[stem, kind] for kind in endings if (stem, kind) in texts), None)
            if text is not None:
                found.append((stem + ending, text))
    return found


def captions_in(path: Path, options: DataOptions) -> Captions:
    """Return the captions in a file beside a picture: a text's lines, or a field of a ``.json``.

    Raises:
        OSError, ValueError: It cannot be read, or holds none.
    """
    text = read_text(path, options.encoding)
    if path.suffix.lower() == ".json":
        return captions_of_json(text, options.caption_key)
    return captions_of_text(text)


class FolderPairs(Pairs):
    """Pictures in a folder and those below it, each with captions beside it; see
    :func:`clipfast.data.sources.open_pairs`.
    """

    def __init__(self, folder: Path, options: DataOptions | None = None, below: Below | None = None) -> None:
        self._options = options or DataOptions()
        endings = caption_endings(self._options)
        below = below or files_below(folder, (*PICTURES, *endings))
        self._folder = folder
        self._pairs = with_captions(below, self._options)
        self.groups = (len(self._pairs),)
        pictures = sum(os.path.splitext(name)[1].lower() in PICTURES for name in below.files)
        if not self._pairs:
            raise ValueError(
                f"data: got no pairs in {folder}, expected pictures with a {endings[0]} beside each; there are "
                f"{pictures} pictures"
            )
        alone = pictures - len(self._pairs)
        tell_left_out(folder, below, more=f"{alone} pictures without captions beside them" if alone else "")

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return str(self._folder / self._pairs[index][0])

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        try:
            return read_picture(self._folder / self._pairs[index][0])
        except OSError as error:
            raise PairError(f"{self.key(index)}: {error}") from error

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        try:
            return captions_in(self._folder / self._pairs[index][1], self._options)
        except (OSError, ValueError) as error:
            raise PairError(f"{self.key(index)}: {error}") from error
