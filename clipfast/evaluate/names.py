"""The names of measures: identifiers in JSON, CSV and logs, words in tables."""

from __future__ import annotations

import re

_RANKED = re.compile(r"(?P<what>top|(?P<direction>(image|text)_to_(image|text))_r)(?P<k>\d+)")


def recall_name(direction: str, k: int) -> str:
    """Return the name of recall at k, ``image_to_text_r5``.

    Args:
        direction: ``"image_to_text"`` or ``"text_to_image"``.
        k: How many of the nearest count.
    """
    return f"{direction}_r{k}"


def is_chance(name: str) -> bool:
    """Tell whether a measure is what chance comes to in another."""
    return "chance" in name


def chance_name(name: str) -> str | None:
    """Return the name of chance in a measure: ``chance5`` for ``top5``; None for those that have none."""
    found = _RANKED.fullmatch(name)
    if found is None:
        return None
    return f"{found['direction']}_chance{found['k']}" if found["direction"] else f"chance{found['k']}"


def words_of(name: str) -> str:
    """Return a measure in words: ``image → text recall@5`` for ``image_to_text_r5``."""
    found = _RANKED.fullmatch(name)
    if found is None:
        return name.replace("_", " ")
    if found["direction"]:
        return f"{found['direction'].replace('_to_', ' → ')} recall@{found['k']}"
    return name
