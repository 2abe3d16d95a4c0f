"""Paths as they are typed: ``train-{000..123}.tar``, several joined by ``::``, or a name that only looks like that."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from clipfast.data.pictures import PICTURES
from clipfast.data.walk import files_below


def expand_pattern(pattern: str) -> list[str]:
    """List the paths that a pattern stands for.

    What exists is taken as it is: a path, or the folders that a pattern begins with, may hold ``{``, ``}`` and ``::``.

    Args:
        pattern: A path; with braces, ``*``, ``?`` and ``[]`` as a shell's; or several joined by ``::``. What matches is
            in the order of names; a pattern that matches nothing stays as it is.
    """
    return [path for part in _split(pattern) for path in _expand(part)]


def anchored(pattern: str, folder: str | os.PathLike[str]) -> str:
    """Return a path or pattern, as :func:`expand_pattern` takes it, whose relative parts start from a folder.

    Addresses (``s3://…``, ``pipe:…``) and absolute paths stay as they are, and ``~`` is the home folder.
    """
    return "::".join(_anchored(part, os.path.abspath(folder)) for part in _split(pattern, os.path.abspath(folder)))


def _anchored(part: str, folder: str) -> str:
    # `{/a,/b}/0.tar` and `{http://a,http://b}/0.tar` begin in braces
    return part if part.lstrip("{").startswith(("pipe:", "/")) else anchored_path(part, folder)


def anchored_path(path: str, folder: str | os.PathLike[str]) -> str:
    """Return one path that starts from a folder if it is relative; ``::`` and braces are letters of its name.

    Addresses (``s3://…``) and absolute paths stay as they are, and ``~`` is the home folder.
    """
    if "://" in path or os.path.isabs(path):
        return path
    joined = os.path.join(os.path.abspath(folder), os.path.expanduser(path))
    neat = os.path.normpath(joined)
    # `..` after a link leads elsewhere than to the folder that holds the link
    return neat if os.path.realpath(neat) == os.path.realpath(joined) else joined


def _split(pattern: str, folder: str = "") -> list[str]:
    """Cut a pattern at every ``::`` that is not in the name of something that exists, as seen from a folder."""
    pieces = pattern.split("::")
    for count in range(len(pieces), 1, -1):
        whole = "::".join(pieces[:count])
        place = os.path.join(folder, whole)
        # of a part that does not exist, the folders may
        if os.path.exists(place) or place.rfind("::") < len(_existing(place)):
            rest = pieces[count:]
            return [whole, *(_split("::".join(rest), folder) if rest else [])]
    return [pieces[0], *(_split("::".join(pieces[1:]), folder) if pieces[1:] else [])]


def _expand(part: str) -> list[str]:
    folders = part if os.path.exists(part) else _existing(part)
    rest = part[len(folders) :]
    names = [folders + rest]
    if "{" in rest:
        import braceexpand

        names = [folders + name for name in braceexpand.braceexpand(rest)]
    return [match for name in names for match in _matches(name, folders)]


def _matches(name: str, folders: str) -> list[str]:
    rest = name[len(folders) :]
    if os.path.exists(name) or "://" in name or not any(sign in rest for sign in "*?["):
        return [name]
    return sorted(glob.glob(glob.escape(folders) + rest, recursive=True)) or [name]


def _existing(path: str) -> str:
    """Return the longest beginning of a path, up to a separator, that exists."""
    end = len(path)
    while (end := path.rfind("/", 0, end)) > 0:
        if os.path.isdir(path[:end]):
            return path[: end + 1]
    return ""


def find_shards(path: str) -> list[Path]:
    """Return the shards that a path or a pattern names, none if it names something else.

    A folder's are those in it; where there are none, those in its folders, unless there are pictures below it too.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is somewhere else than in a file.
    """
    place = Path(path)
    if place.is_dir():
        if shards := sorted(place.glob("*.tar")):
            return shards
        below = sorted(place.glob("*/*.tar"))
        return [] if below and files_below(place, PICTURES).files else below
    if place.is_file():
        return [place] if path.endswith(".tar") else []
    if path.endswith(".parquet"):
        return []
    if "::" in path or "{" in path or path.endswith(".tar"):
        return expand_shards(path)
    return []


def find_parquet(path: str) -> list[Path]:
    """Return the Parquet files that a path or a pattern names; of a folder, those below it, by their paths.

    Raises:
        FileNotFoundError: A file is missing.
    """
    place = Path(path)
    if place.is_dir():
        return [place / name for name in files_below(place, (".parquet",)).ordered()]
    if place.is_file():
        return [place] if path.endswith(".parquet") else []
    if not path.endswith(".parquet"):
        return []
    names = expand_pattern(path)
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data: {len(missing)} of {len(names)} Parquet files are missing, the first is {missing[0]}: correct the "
            f"pattern"
        )
    return [Path(name) for name in names]


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
