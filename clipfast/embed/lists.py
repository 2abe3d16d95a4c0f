"""Files and lines that are embedded: a folder's pictures or texts, and lists of paths or texts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from clipfast.data.captions import captions_of_text
from clipfast.data.folder_pairs import caption_endings, captions_in, with_captions
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, PairError
from clipfast.data.pictures import PICTURES, is_picture
from clipfast.data.places import read_picture
from clipfast.data.text_files import EncodingError, check_encoding, decode, read_lines, split_lines
from clipfast.data.walk import files_below, tell_left_out
from clipfast.embed.rows import digest_of, in_lines

Kind = Literal["image", "text"]


class Files:
    """Files by their names; a name that is not absolute is below a folder, and one that is blank is none.

    Args:
        names: The names.
        kind: What the files hold.
        base: The folder.
        place: What errors call the whole.
        options: For the encoding and the key of captions.
        beside: Which files hold the pictures' captions, by the pictures' names.
    """

    def __init__(
        self,
        names: Sequence[str],
        kind: Kind,
        base: Path,
        place: Path,
        options: DataOptions | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> None:
        if not any(name.strip() for name in names):
            what = f"pictures ({', '.join(PICTURES[:4])}, …)" if kind == "image" else "texts (.txt)"
            raise ValueError(f"source: got no {what} in {place}, expected at least one")
        self.kind = kind
        self._names, self._base, self._beside = names, base, beside or {}
        self._options = options or DataOptions()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return self._names[row] if self._names[row].strip() else f"line {row + 1}"

    def read(self, row: int) -> bytes | str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        name = self._names[row]
        if not name.strip():
            raise PairError("it is blank")
        data = read_picture(self._base / name)
        if self.kind == "image":
            return data
        try:
            return decode(data, name, self._options.encoding)
        except EncodingError as error:
            raise PairError(str(error)) from error

    def captions(self, row: int) -> Captions:
        """Return the captions in a row's text, one a line."""
        return captions_of_text(str(self.read(row)))

    def caption(self, row: int, content: bytes | str) -> str | None:
        """See :class:`clipfast.embed.reader.Inputs`; what cannot be read is none: the picture is what is embedded."""
        file = self._beside.get(self._names[row])
        if file is None:
            return None
        try:
            return in_lines(captions_in(self._base / file, self._options))
        except (OSError, ValueError):
            return None

    def fingerprint(self) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        encoding = self._options.encoding or ""
        return digest_of("files", self.kind, encoding, str(self._base.resolve()), *self._names)


def folder_files(folder: Path, kind: Kind, options: DataOptions) -> Files:
    """Return the pictures, or the ``.txt`` files, in a folder and below it, in the order of their paths.

    Pictures know the captions beside them.

    Raises:
        OSError: The folder cannot be read.
        ValueError: There are none.
    """
    if kind == "image":
        below = files_below(folder, (*PICTURES, *caption_endings(options)))
        pictures = sorted(name for name in below.files if is_picture(name))
        files = Files(pictures, kind, folder, folder, options, dict(with_captions(below, options)))
    else:
        below = files_below(folder, (".txt",))
        files = Files(sorted(below.files), kind, folder, folder, options)
    # captions beside pictures, and pictures beside captions, are nothing that was forgotten
    tell_left_out(folder, below, besides=(".txt", ".json") if kind == "image" else (*PICTURES, ".json"))
    return files


class Texts:
    """The lines of a file; one that is blank is no text."""

    kind: Kind = "text"

    def __init__(self, texts: Sequence[str], place: Path) -> None:
        if not any(text.strip() for text in texts):
            raise ValueError(f"source: got no texts in {place}, expected one on every line")
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def name(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return self._texts[row] if self._texts[row].strip() else f"line {row + 1}"

    def read(self, row: int) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        if not self._texts[row].strip():
            raise PairError("it is blank")
        return self._texts[row]

    def caption(self, row: int, content: bytes | str) -> str | None:
        """See :class:`clipfast.embed.reader.Inputs`: a row is called by its text."""
        return None

    def fingerprint(self) -> str:
        """See :class:`clipfast.embed.reader.Inputs`."""
        return digest_of("texts", *self._texts)


def open_list(place: Path, kind: Kind, encoding: str | None = None) -> Files | Texts:
    """Return the paths or texts of a list, one a line: row i is line i + 1, blank lines too.

    Paths that are not UTF-8 are taken as they are where files have these names, as ``ls > list.txt`` writes them.

    Raises:
        OSError: The list cannot be read.
        ValueError: It holds nothing, or is in another encoding.
    """
    if kind == "text":
        return Texts(read_lines(place, encoding), place)
    return Files(_paths(place, encoding), kind, place.parent, place, DataOptions(encoding=encoding))


def _paths(place: Path, encoding: str | None) -> list[str]:
    try:
        return read_lines(place, encoding)
    except EncodingError:
        if encoding is not None and check_encoding(encoding) != "utf-8-sig":
            raise
        lines = split_lines(place.read_bytes().decode("utf-8-sig", "surrogateescape"))
        odd = [line for line in lines if not line.isascii() and line != line.encode("utf-8", "replace").decode()]
        if not odd or not all(_is_there(place.parent, line) for line in odd):
            raise
        return lines


def _is_there(folder: Path, name: str) -> bool:
    try:
        return os.path.lexists(folder / name)
    except ValueError:  # a zero in it
        return False
