"""Text files as people have them: their encoding is checked, and a line ends where a writer ended it.

Everything is UTF-8 unless the caller says otherwise; a byte order mark of UTF-8 is dropped. What is in another encoding
is an error that names the file, the offset and the option. Lines end with ``\\n`` or ``\\r\\n`` and nothing else:
``str.splitlines`` ends them at U+2028, U+0085 and form feeds too, which captions hold.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK = 1 << 20


class EncodingError(ValueError):
    """A text that is not in the encoding it is read in."""


def check_encoding(encoding: str | None) -> str:
    """Return the codec that reads an encoding, ``utf-8-sig`` for UTF-8.

    Args:
        encoding: A name that Python knows; None is UTF-8.

    Raises:
        ValueError: There is no such encoding of text.
    """
    if encoding is None:
        return "utf-8-sig"
    try:
        name = codecs.lookup(encoding).name
        "".encode(name)  # refuses codecs that are none of text, such as hex
    except (LookupError, ValueError) as error:
        raise ValueError(
            f"encoding: got {encoding!r}, expected one that Python knows, such as utf-8, utf-16, latin-1 or cp1252"
        ) from error
    return "utf-8-sig" if name == "utf-8" else name


def decode(data: bytes, name: str, encoding: str | None = None) -> str:
    """Return a text's characters, without a byte order mark.

    Args:
        data: The whole of it.
        name: What to call it in an error.
        encoding: As :func:`check_encoding`.

    Raises:
        EncodingError: It is in another encoding; names the text, the first wrong byte's offset, and ``--encoding``.
        ValueError: There is no such encoding.
    """
    codec = check_encoding(encoding)
    if encoding is None:
        _check_start(data[:4096], name)
    try:
        return data.decode(codec).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        # a codec that drops a mark counts from behind it
        dropped = 3 if codec == "utf-8-sig" and data.startswith(codecs.BOM_UTF8) else 0
        raise _wrong(name, codec, error.start + dropped, error.object[error.start : error.start + 1]) from error
    except UnicodeError as error:  # UTF-16 without a mark, for one, says no place
        raise EncodingError(f"{name}: got no {encoding}: {error}: give --encoding for what it is") from error


def _check_start(start: bytes, name: str) -> None:
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            raise EncodingError(
                f"{name}: got the byte order mark of {encoding} at byte 0, expected UTF-8: give --encoding {encoding}"
            )
    # Latin letters in UTF-16 are every other byte a zero, which UTF-8 reads as a character
    if len(start) >= 4 and 3 * start.count(0) >= len(start):
        likely = "utf-16-be" if start[0] == 0 else "utf-16-le"
        raise EncodingError(
            f"{name}: got a zero at byte {start.index(0)} and many more, expected UTF-8: give --encoding {likely} if "
            f"it is that"
        )


def _wrong(name: str, codec: str, offset: int, byte: bytes) -> EncodingError:
    shown = "UTF-8" if codec == "utf-8-sig" else codec
    got = f"{byte[0]:#04x}" if byte else "the end"
    other = "latin-1, cp1252, utf-16 …" if codec == "utf-8-sig" else "utf-8 …"
    return EncodingError(
        f"{name}: got {got} at byte {offset}, expected {shown}: give --encoding for what it is ({other})"
    )


def without_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: halves of a pair are joined, and one that is alone becomes U+FFFD.

    JSON gives lone surrogates for ``"\\ud83d"``, the system for names that are not UTF-8. The tokenizer reads them so.
    """
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, which end with ``\\n`` or ``\\r\\n``; the last one may have no end."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_text(path: str | os.PathLike[str], encoding: str | None = None) -> str:
    """Return what a text file holds, with its line ends as they are.

    Raises:
        OSError: It cannot be read.
        EncodingError, ValueError: As :func:`decode`.
    """
    return decode(Path(path).read_bytes(), os.fspath(path), encoding)


def read_lines(path: str | os.PathLike[str], encoding: str | None = None) -> list[str]:
    """Return the lines of a text file, blank ones too: line i stays line i. Errors as :func:`read_text`."""
    return split_lines(read_text(path, encoding))


def iterate_lines(path: str | os.PathLike[str], encoding: str | None = None) -> Iterator[str]:
    """Yield the lines of a text file with their ends, of a file that may be larger than memory.

    Raises:
        OSError: It cannot be read.
        EncodingError, ValueError: As :func:`decode`.
    """
    codec = check_encoding(encoding)
    name = os.fspath(path)
    if encoding is None:
        with open(path, "rb") as file:
            _check_start(file.read(4096), name)
    # newline="\n": no other end is one, and none is changed
    with open(path, encoding=codec, newline="\n") as text:
        try:
            yield from _without_mark(text)
        except UnicodeError as error:
            raise _find_wrong(name, codec) from error


def _without_mark(text: TextIO) -> Iterator[str]:
    for first in text:
        yield first.removeprefix("\ufeff")
        break
    yield from text


def _find_wrong(name: str, codec: str) -> EncodingError:
    """Say where a file's first wrong byte is: a stream's own error counts from wherever its buffer began."""
    decoder = codecs.getincrementaldecoder(codec)()
    before = 0
    with open(name, "rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                dropped = len(chunk) + kept - len(error.object)
                return _wrong(name, codec, before - kept + dropped + error.start, error.object[error.start :][:1])
            except UnicodeError as error:
                return EncodingError(f"{name}: got no {codec}: {error}: give --encoding for what it is")
            before += len(chunk)
            if not chunk:
                return EncodingError(f"{name}: it changed while it was read")
