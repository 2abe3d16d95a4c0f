"""Where the pictures are that a table or a list names: beside it, or in a folder nearby."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

# names that are tried: the first pictures of a list may be missing
_TRIED = 20


def find_base(near: Path, names: Sequence[str], folders: Iterable[Path] = ()) -> Path:
    """Return the folder that names of pictures start from.

    Args:
        near: Where the list lies: pictures are beside it, or in one of the folders beside it.
        names: The pictures' names, as the list has them.
        folders: Other places to look, each before the ones that follow it.

    Returns:
        ``near`` where none of the first names is found anywhere: then each missing picture is an error of its own.

    Raises:
        ValueError: They are found in several folders beside the list.
    """
    tried = list(dict.fromkeys(names))[:_TRIED]
    for base in (near, *folders):
        if _holds(base, tried):
            return base
    beside = [folder for folder in sorted(near.iterdir()) if folder.is_dir() and _holds(folder, tried)]
    if len(beside) > 1:
        raise ValueError(
            f"data: got pictures such as {tried[0]} in {beside[0]} and in {beside[1]}, expected one folder of them "
            f"beside the list"
        )
    return beside[0] if beside else near


def _holds(base: Path, names: Sequence[str]) -> bool:
    try:
        return any((base / name).is_file() for name in names)
    except (OSError, ValueError):  # a name that is too long, or holds a zero
        return False


def refuse_urls(names: Sequence[str], where: str) -> None:
    """Raise ValueError if pictures are named by URLs: CC3M's and CC12M's lists are no pictures yet."""
    if names and names[0].startswith(("http://", "https://", "s3://")):
        raise ValueError(
            f"data: got URLs such as {names[0]!r} in {where}, expected paths: fetch the pictures first, for instance "
            f"with img2dataset, and give the shards or the folder that it writes"
        )


def read_picture(path: Path) -> bytes:
    """Return what a picture's file holds.

    Raises:
        OSError: It cannot be read, or is no file: a pipe would be waited for.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(f"{str(path)!r}: it is no file")
        return path.read_bytes()
    except ValueError as error:  # a zero in the name
        raise OSError(f"{str(path)!r}: {error}") from error
