"""What files an input is made of, by name, size and time: whether a run that goes on has the input it began with."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from clipfast.data.patterns import expand_pattern
from clipfast.data.pictures import PICTURES
from clipfast.data.walk import files_below

# files that are kept by name; of more, a digest tells that something changed and not what
_NAMED = 10_000
_ENDINGS = (*PICTURES, ".txt", ".json", ".csv", ".tsv", ".tar", ".parquet")


def input_facts(path: str | os.PathLike[str], but: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Return ``count``, ``digest`` and, of no more than 10,000 files, ``files``: ``[size, time]`` by name.

    Pictures that a table names are not looked at.

    Args:
        path: A file, a folder or a pattern, as for :func:`clipfast.data.sources.open_pairs`.
        but: A folder whose files do not count: where the output goes, if that is below ``path``.

    Raises:
        OSError: A file is missing.
    """
    out = None if but is None else os.path.abspath(but) + os.sep
    files = {name: facts for name, facts in sorted(_facts(os.fspath(path))) if out is None or not name.startswith(out)}
    digest = hashlib.sha256(json.dumps(list(files.items())).encode()).hexdigest()
    return {"count": len(files), "digest": digest} | ({"files": files} if len(files) <= _NAMED else {})


def _facts(path: str) -> Iterable[tuple[str, list[int]]]:
    for place in map(Path, expand_pattern(path)):
        if place.is_dir():
            for name in files_below(place, _ENDINGS).files:
                yield f"{os.path.abspath(place)}/{name}", _of(place / name)
        else:
            yield os.path.abspath(place), _of(place)


def _of(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError:
        if path.is_symlink():
            return [-1, -1]  # a link that leads nowhere
        raise
    return [stat.st_size, stat.st_mtime_ns]


def difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Say how an input differs from what it was; None where it does not."""
    if before["digest"] == now["digest"]:
        return None
    if "files" not in before or "files" not in now:
        same = before["count"] == now["count"]
        return f"{now['count']} files" + (", of which some changed" if same else f" and not {before['count']}")
    old, new = before["files"], now["files"]
    words = []
    for what, names in (
        ("changed", [n for n in new if n in old and old[n] != new[n]]),
        ("new", [n for n in new if n not in old]),
        ("gone", [n for n in old if n not in new]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            words.append(f"{names[0]}{more} {'is' if len(names) == 1 else 'are'} {what}")
    return ", ".join(words) or "the same files in another order"
