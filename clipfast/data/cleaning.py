"""What CLIP's tokenizer does to a text before it cuts it up: ftfy, HTML entities, lower case, white space.

ftfy asks every text for mojibake and goes over it a dozen times, 25 to 150 µs a caption. Most captions need a part
of that, or nothing, and which can be told from their characters. Every shortcut here gives what ftfy would give;
a text that no shortcut is sure of goes to ftfy itself.
"""

from __future__ import annotations

import hashlib
import html
import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache

import ftfy
from ftfy.badness import BADNESS_RE, is_bad
from ftfy.fixes import fix_character_width, fix_latin_ligatures, remove_control_chars, uncurl_quotes, unescape_html

# What ftfy and html.unescape leave alone in ASCII: all but control characters and what may begin an HTML entity. (They
# also change line breaks, but into other white space, and words are cut at any white space.)
_is_clean_ascii = re.compile(r"(?:[\t\n\f\r -%'-~]|&(?![^\t\n\f <&;]))*").fullmatch
_others = re.compile(r"[^\t\f -~]").findall

# What ftfy may take for mojibake is made of characters of the old 8-bit character sets, which are these.
_8_BIT = "\x80-\u2e7f\uf8ff\ufb01\ufb02\ufffd"
# Greek and Cyrillic letters, which stand side by side in ordinary texts. Ђ is none of them: it follows в in mojibake.
_ORDINARY = "Α-ΡΣ-Ωα-ωА-Яа-я"
# Characters that are mojibake beside ASCII too. All others need one of their own kind beside them, and one of a pair is
# no ordinary letter. tests/data/test_cleaning.py takes ftfy's expression apart to see that.
_ALONE = "\x80-\x9fŒœÃÂ"
_ORDINARY_PAIR = f"(?<![{_ORDINARY}](?=[{_ORDINARY}]))"
_may_be_bad = re.compile(f"[{_8_BIT}]{_ORDINARY_PAIR}[{_8_BIT}]|[{_ALONE}]").search
# of the expression that these were read from, ftfy 6.3.1's; of another they may not be true
_KNOWN = "9dcc0f2ac90d9ae3c85eb7b9b2c0b8a8e8126153847c2b30c91a0bb263f3b8c4"


@cache
def _is_known() -> bool:
    return hashlib.sha256(BADNESS_RE.pattern.encode()).hexdigest() == _KNOWN


def _looks_bad(text: str) -> bool:
    """Whether ftfy takes something in ``text`` for mojibake."""
    return not (_is_known() and _may_be_bad(text) is None) and is_bad(text)


class _Images(dict[str, str | None]):
    """What ftfy makes of a character wherever it stands, or None where that depends on its neighbours."""

    def __missing__(self, character: str) -> str | None:
        image = remove_control_chars(uncurl_quotes(fix_character_width(fix_latin_ligatures(character))))
        image = unicodedata.normalize("NFC", image)
        certain = ftfy.fix_text(character) == image and not image.count("\n")
        image = self[character] = image if certain else None
        return image


# the first is a part of a line break, or of a terminal's commands
_images = _Images(dict.fromkeys("\n\r\x1b\x85\u2028\u2029"))


def _quick_fix(text: str) -> str | None:
    """Return ``ftfy.fix_text(text)`` where a few of its steps are all that it takes, else None."""
    if "\n" in text or len(text) > 100_000:  # ftfy goes by lines, and by parts of very long ones
        return None
    has_tags = "<" in text
    while True:
        before = text
        if "&" in text and not has_tags:
            text = unescape_html(text)
        characters = set(_others(text))
        if characters:
            images = {c: _images[c] for c in characters}
            if None in images.values() or _looks_bad(text):
                return None
            if any(image != c for c, image in images.items()):
                text = text.translate({ord(c): image for c, image in images.items()})
            if not unicodedata.is_normalized("NFC", text):
                text = unicodedata.normalize("NFC", text)
        if text == before:
            return text


def _fixed(text: str) -> str:
    """Undo mojibake and HTML entities; white space may become other white space."""
    if _is_clean_ascii(text):
        return text
    fixed = _quick_fix(text)
    return html.unescape(html.unescape(ftfy.fix_text(text) if fixed is None else fixed))


def clean_words(text: str) -> list[str]:
    """Return the words CLIP's tokenizer sees: mojibake and HTML entities undone, lower case, cut at white space."""
    return _fixed(text).lower().split()


# --- what other tokenizers do -----------------------------------------------------------------------------

_without_punctuation = str.maketrans("", "", string.punctuation)


def _whitespace(text: str) -> str:
    return " ".join(_fixed(text).split())


def _lower(text: str) -> str:
    return _whitespace(text).lower()


def _canonicalize(text: str) -> str:
    # big_vision's, after what open_clip does to every text
    return " ".join(_fixed(text).replace("_", " ").translate(_without_punctuation).lower().split())


def _siglip(text: str) -> str:
    return re.sub(r"\s+", " ", text.lower().translate(_without_punctuation)).strip()


#: What texts go through before a tokenizer that was read from a file. The first three are open_clip's of these names;
#: ``siglip`` is what transformers' ``SiglipTokenizer`` does. ``lowercase``, which Rust does, is that of its
#: ``Siglip2Tokenizer``: character by character, so that a Σ becomes σ at the end of words too.
CLEANERS: dict[str, Callable[[str], str]] = {
    "whitespace": _whitespace,
    "lower": _lower,
    "canonicalize": _canonicalize,
    "siglip": _siglip,
}


def without_surrogates(text: str) -> str:
    """Return a text that UTF-8 can hold: pairs of surrogates become their character, lone ones U+FFFD."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
