"""Paths as they are typed: ``train-{000..123}.tar``, several joined by ``::``, or a name that only looks like that."""

from __future__ import annotations

import os
from pathlib import Path


def expand_pattern(pattern: str) -> list[str]:
    """List the paths that a pattern stands for.

    What exists is taken as it is: a path, or the folders that a pattern begins with, may hold ``{``, ``}`` and ``::``.

    Args:
        pattern: A path; with braces as a shell's; or several joined by ``::``.
    """
    return [path for part in _split(pattern) for path in _expand(part)]


def _split(pattern: str) -> list[str]:
    """Cut a pattern at every ``::`` that is not in the name of something that exists."""
    pieces = pattern.split("::")
    for count in range(len(pieces), 1, -1):
        whole = "::".join(pieces[:count])
        # of a part that does not exist, the folders may
        if os.path.exists(whole) or whole.rfind("::") < len(_existing(whole)):
            rest = pieces[count:]
            return [whole, *(_split("::".join(rest)) if rest else [])]
    return [pieces[0], *(_split("::".join(pieces[1:])) if pieces[1:] else [])]


def _expand(part: str) -> list[str]:
    folders = part if os.path.exists(part) else _existing(part)
    rest = part[len(folders) :]
    if "{" not in rest:
        return [part]
    import braceexpand

    return [folders + name for name in braceexpand.braceexpand(rest)]


def _existing(path: str) -> str:
    """Return the longest beginning of a path, up to a separator, that exists."""
    end = len(path)
    while (end := path.rfind("/", 0, end)) > 0:
        if os.path.isdir(path[:end]):
            return path[: end + 1]
    return ""


def find_shards(path: str) -> list[Path]:
    """Return the shards that a path or a pattern names, none if it names something else.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is somewhere else than in a file.
    """
    place = Path(path)
    if place.is_dir():
        return sorted(place.glob("*.tar"))
    if place.is_file():
        return [place] if path.endswith(".tar") else []
    if "::" in path or "{" in path or path.endswith(".tar"):
        return expand_shards(path)
    return []


def expand_shards(pattern: str) -> list[Path]:
    """List the shards of ``a-{000..099}.tar``, or of several such patterns joined by ``::``.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is somewhere else than in a file.
    """
    names = expand_pattern(pattern)
    remote = [name for name in names if "://" in name or name.startswith("pipe:")]
    if remote:
        raise ValueError(f"data: got {remote[0]}, expected files: mount the store, or copy the shards first")
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}: correct the pattern"
        )
    return [Path(name) for name in names]
