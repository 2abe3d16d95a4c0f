"""Which captions a sample has: the lines of a text, the values of a field; and which of them a step takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from clipfast.data.options import alternatives, usual_name
from clipfast.data.pairs import Captions, PairError
from clipfast.data.text_files import split_lines

# extensions of files with captions, and fields of a .json, in the order in which they are looked for
CAPTION_FILES = ("txt", "text", "caption")
CAPTION_FIELDS = ("caption", "captions", "text", "title")
# fields in which lists of sentences keep the text of each (COCO's and Karpathy's JSON)
FIELDS_OF_SENTENCES = ("raw", "caption", "text")


def captions_of_text(text: str) -> Captions:
    """Take every line that is not blank for a caption, as clip-benchmark does.

    Lines end with ``\\n`` or ``\\r\\n`` alone: other characters that Unicode calls separators may stand in a caption.
    """
    return Captions(tuple(line for line in split_lines(text) if line.strip()) or ("",))


def captions_of_value(value: Any, name: str = "caption") -> Captions:
    """Take the captions of a value of JSON or Parquet: a text is one, a list is several.

    Args:
        value: The value. Entries of a list may be objects with the text in ``raw``, ``caption`` or ``text``.
        name: What to call the field in errors.

    Raises:
        PairError: The value is null, a number, an object, or a list without a text. None of them becomes words.
    """
    if isinstance(value, str):
        return Captions((value,))
    if isinstance(value, dict):
        for field in FIELDS_OF_SENTENCES:
            if field in value:
                return captions_of_value(value[field], f"{name}.{field}")
    if not isinstance(value, list | tuple):
        raise PairError(f"{name}: got {_described(value)}, expected a text or a list of texts")
    texts: list[str] = []
    unusable: list[tuple[str, str]] = []
    for number, entry in enumerate(value, 1):
        if isinstance(entry, dict):
            entry = next((entry[field] for field in FIELDS_OF_SENTENCES if field in entry), entry)
        if isinstance(entry, str) and entry.strip():
            texts.append(entry)
        else:
            unusable.append((f"{name} {number}", f"got {_described(entry)}, expected a text"))
    if not texts:
        raise PairError(f"{name}: got {', '.join(_described(v) for v in value[:3]) or 'no entries'}, expected a text")
    return Captions(tuple(texts), tuple(unusable))


def caption_files(key: str | None) -> list[str]:
    """Return the extensions of the files that hold captions, in the order in which they are looked for.

    Args:
        key: As :class:`clipfast.data.options.DataOptions` has it.
    """
    return [name.lower() for name in alternatives(key)] if key else list(CAPTION_FILES)


def captions_of_json(text: str, key: str | None = None) -> Captions:
    """Take the captions of a field of a sample's ``.json``.

    Args:
        text: The JSON.
        key: The field, or alternatives; ``meta.caption`` is one below; by default it is one of
            the usual names, or the whole, where it is a list or a text; ``json`` is the whole, too.

    Raises:
        PairError: It is no JSON, the field is missing, or holds no text.
    """
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PairError(f"json: {type(error).__name__}: {error}") from error
    names: Sequence[str] = alternatives(key) if key else CAPTION_FIELDS
    if (key is None or "json" in names) and isinstance(value, list | str):
        return captions_of_value(value, "json")
    if key is None and isinstance(value, dict):
        names = [usual_name(value, CAPTION_FIELDS) or CAPTION_FIELDS[0]]
    for name in names:
        found = value
        for step in [name] if isinstance(value, dict) and name in value else name.split("."):
            found = found.get(step, _MISSING) if isinstance(found, dict) else _MISSING
        if found is not _MISSING:
            return captions_of_value(found, name)
    fields = ", ".join(value) if isinstance(value, dict) else _described(value)
    raise PairError(f"json: got {fields[:200] or 'nothing'}, expected the field {' or '.join(names)}")


_MISSING = object()


def _described(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "an empty text"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"the number {value}"
    return {dict: "an object", list: "a list"}.get(type(value), type(value).__name__)


def draw_caption(count: int, seed: int, epoch: int, index: int) -> int:
    """Return which of a sample's captions an epoch takes.

    The captions are taken in a random order of the sample's own, and in another one when all had their turn. The draw
    depends on its arguments alone: ranks, workers and restarts change nothing.

    Args:
        count: How many captions there are.
        seed: Of the run.
        epoch: How often the data were gone through before.
        index: The sample's number in its source.
    """
    if count == 1:
        return 0
    turn, place = divmod(epoch, count)
    return int(np.random.default_rng([seed, turn, index, 0xCA97]).permutation(count)[place])
