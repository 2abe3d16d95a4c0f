"""What SentencePiece does to a text before it cuts it up: replaced characters, and blanks that become ``▁``.

The replacements (NFKC and others) are compiled into the model's file, as a double-array trie over UTF-8 bytes. At
each place the longest key counts. The ``Precompiled`` normaliser of the `tokenizers` library looks at graphemes in its
place, and gives other texts for decomposed Hangul, for instance.
"""

from __future__ import annotations

import re
import sys
from array import array

from clipfast.data.spm_file import USER_DEFINED, SpmFile

SPACE = "▁"
_LONGEST_KEY = 64  # characters that are looked at for one; those of NFKC have up to 18 bytes


class Normalizer:
    """The text that a SentencePiece model sees.

    Args:
        file: The model.

    Raises:
        ValueError: The compiled replacements are damaged.
    """

    def __init__(self, file: SpmFile) -> None:
        self._file = file
        self._units, self._texts = _charsmap(file.charsmap)
        # what a character becomes, whatever follows it; False where that depends
        self._images: dict[str, str | bool] = {}
        symbols = sorted((p.text for p in file.pieces if p.kind == USER_DEFINED), key=len, reverse=True)
        # they are left alone; without replacements there is nothing to leave alone, but blanks within them
        self._symbol = None
        if symbols and (self._units or any(" " in symbol for symbol in symbols)):
            self._symbol = re.compile("|".join(map(re.escape, symbols))).match
        plain = self._plain()
        self._is_plain = re.compile(f"{plain}*").fullmatch
        self._plain_run = re.compile(f"{plain}+").match

    def __call__(self, text: str) -> str:
        """Return the normalised text. Lone surrogates must have been replaced."""
        parts = [text] if self._is_plain(text) else self._replaced(text)
        file = self._file
        if file.remove_extra_whitespaces:
            parts = _single_blanks(parts)
            if parts is None:
                return ""
        result = "".join(parts).replace(" ", SPACE)
        before, after = (file.add_dummy_prefix and not file.whitespace_as_suffix), file.whitespace_as_suffix
        if not text:
            return ""
        if before:
            result = SPACE + result
        if file.remove_extra_whitespaces:
            result = result.rstrip(SPACE)
        return result + SPACE if after and file.add_dummy_prefix else result

    # --- replacements -------------------------------------------------------------------------------------

    def _plain(self) -> str:
        """An expression for characters of which no replacement changes any text: of ASCII, and ``▁``."""
        if self._symbol is not None:
            return "(?!)"
        if not self._units:
            return r"[\s\S]"
        plain = [SPACE] if self._image(SPACE) == SPACE else []
        for code in range(128):
            node, value, length = self._walk(bytes([code]))
            same = not length or value == chr(code)
            # a key may go on with a character that is no ASCII, such as an accent
            after = [chr(other) for other in range(1, 128)] + [SPACE]
            if same and (node is None or all(self._walk(f"{chr(code)}{c}".encode())[0] is None for c in after)):
                plain.append(re.escape(chr(code)))
        return f"[{''.join(plain)}]" if plain else "(?!)"

    def _replaced(self, text: str) -> list[str]:
        """Return the parts that a text becomes, with what a replacement gives as one part."""
        if not self._units and self._symbol is None:
            return list(text)
        parts: list[str] = []
        index = 0
        while index < len(text):
            run = self._plain_run(text, index)
            if run and run.end() > index + (run.end() < len(text)):
                # the last of them may be the beginning of a key
                end = run.end() - (run.end() < len(text))
                piece = text[index:end]
                # its characters are parts by themselves: all blanks but the first of them go
                parts.append(re.sub(" {2,}", " ", piece) if self._file.remove_extra_whitespaces else piece)
                index = end
                if index == len(text):
                    break
            found = self._symbol(text, index) if self._symbol is not None else None
            character = text[index]
            image = found[0] if found else self._images.get(character)
            if image is None:
                image = self._images[character] = self._image(character)
            if image is False:
                # no key is longer than a few characters
                following = text[index : index + _LONGEST_KEY].encode()
                _, image, length = self._walk(following)
                image, width = (image, len(following[:length].decode())) if length else (character, 1)
            else:
                width = len(found[0]) if found else 1
            parts.append(image)
            index += width
        return parts

    def _image(self, character: str) -> str | bool:
        node, value, length = self._walk(character.encode())
        if node is not None and any(self._step(node, byte) is not None for byte in range(1, 256)):
            return False
        return value if length else character

    def _walk(self, data: bytes) -> tuple[int | None, str, int]:
        """Follow the trie along bytes: the node where they end, and the value and length of the longest key."""
        units = self._units
        value, length = "", 0
        node: int | None = 0
        if not units:
            return None, value, length
        position = _offset(units[0])
        for count, byte in enumerate(data, 1):
            node = position ^ byte
            if node >= len(units) or units[node] & 0x800000FF != byte:
                return None, value, length
            unit = units[node]
            position = node ^ _offset(unit)
            if position >= len(units):
                raise ValueError(f"got a damaged charsmap: node {node} leads to {position} of {len(units)}")
            if unit >> 8 & 1:
                value, length = self._value(units[position] & 0x7FFFFFFF), count
        return node, value, length

    def _step(self, node: int, byte: int) -> int | None:
        after = node ^ _offset(self._units[node]) ^ byte
        return after if after < len(self._units) and self._units[after] & 0x800000FF == byte else None

    def _value(self, place: int) -> str:
        return self._texts[place : self._texts.index(b"\0", place)].decode()


def _single_blanks(parts: list[str]) -> list[str] | None:
    """Drop blanks at the front, and those behind another one at the front of a part; None if nothing but blanks."""
    if len(parts) == 1:
        text = parts[0].lstrip(" ")
        return [re.sub(" {2,}", " ", text)] if text or not parts[0] else None
    if all(part == " " for part in parts):
        return None
    kept: list[str] = []
    after_blank = True
    for part in parts:
        if after_blank:
            part = part.lstrip(" ")
        if part:
            kept.append(part)
            after_blank = part.endswith(" ")
    return kept


def _charsmap(data: bytes) -> tuple[array[int], bytes]:
    units = array("I")
    if not data:
        return units, b""
    size = int.from_bytes(data[:4], "little")
    if size % 4 or not 4 <= size < len(data) - 4 or not data.endswith(b"\0"):
        raise ValueError(f"got a damaged charsmap: a trie of {size} bytes in {len(data)}")
    units.frombytes(data[4 : 4 + size])
    if units.itemsize != 4:
        raise ValueError("got a platform whose unsigned int has not four bytes")
    if sys.byteorder == "big":
        units.byteswap()
    return units, data[4 + size :]


def _offset(unit: int) -> int:
    return (unit >> 10) << ((unit & (1 << 9)) >> 6)
