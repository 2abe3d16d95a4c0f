"""Folders and what lies below them: links are followed, circles are noticed, and what is left out is counted."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from clipfast.data.pictures import ending_of

# kinds that are named in a notice; the rest are summed up
_NAMED = 8


@dataclass
class Below:
    """The files below a folder.

    Attributes:
        files: Those of the endings that were asked for, relative to the folder, with ``/``, in no order.
        left_out: How many there are of other endings; ``""`` counts names without one.
        circles: Links to folders that they lie in, which are not followed.
        closed: Folders that cannot be read, and why.
    """

    files: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    circles: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def ordered(self) -> list[str]:
        """Return the files in the order of their paths, folder by folder."""
        return sorted(self.files, key=lambda name: name.split("/"))


def files_below(folder: str | os.PathLike[str], endings: Iterable[str]) -> Below:
    """Find the files in a folder and in those below it, behind links too.

    A folder that is linked to from two places is found in both. A link to a folder that it lies in is a circle: it is
    noted and not followed. A link that leads nowhere counts as a file, so that reading it says what is wrong.

    Args:
        folder: Where to look.
        endings: In lower case, with their dots; names are compared without regard to case.

    Raises:
        OSError: The folder itself cannot be read.
    """
    wanted = frozenset(endings)
    below = Below()
    root = os.fspath(folder)
    stat = os.stat(root)
    os.scandir(root).close()
    # each with its name below the folder and the folders that it lies in
    waiting = [(root, "", frozenset([(stat.st_dev, stat.st_ino)]))]
    while waiting:
        place, prefix, above = waiting.pop()
        try:
            with os.scandir(place) as entries:
                found = list(entries)
        except OSError as error:
            below.closed.append(f"{prefix.rstrip('/')}: {error.strerror}")
            continue
        for entry in found:
            name = prefix + entry.name
            if not _is_folder(entry):
                ending = ending_of(entry.name)
                if ending in wanted:
                    below.files.append(name)
                else:
                    below.left_out[ending] += 1
                continue
            here = os.stat(entry.path)
            identity = here.st_dev, here.st_ino
            if identity in above:
                below.circles.append(name)
            else:
                waiting.append((entry.path, name + "/", above | {identity}))
    return below


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False  # a link to itself


def tell_left_out(folder: str | os.PathLike[str], below: Below, *, besides: Iterable[str] = (), more: str = "") -> None:
    """Warn of what is not read of a folder: how many files of each other kind, circles, closed folders.

    Args:
        folder: Where it lies.
        below: What :func:`files_below` found, of one folder or several joined by :func:`join`.
        besides: Endings of files that belong to the others, such as captions.
        more: What else was left out, in words.
    """
    left = Counter({ending: count for ending, count in below.left_out.items() if ending not in set(besides)})
    parts = [more] if more else []
    if left:
        kinds = [f"{count} {ending or 'without an ending'}" for ending, count in left.most_common(_NAMED)]
        if len(left) > _NAMED:
            kinds.append(f"{len(left) - _NAMED} kinds more")
        parts.append(f"{left.total()} files of other kinds ({', '.join(kinds)})")
    for words, names in (
        ("links that lead in a circle", below.circles),
        ("folders that cannot be read", below.closed),
    ):
        if names:
            parts.append(f"{len(names)} {words} ({', '.join(sorted(names)[:3])}{', …' if len(names) > 3 else ''})")
    if parts:
        warnings.warn(f"data: left out of {os.fspath(folder)}: {'; '.join(parts)}", stacklevel=3)


def join(parts: Iterable[tuple[str, Below]]) -> Below:
    """Join what lies below several folders, given by their names in the one that holds them."""
    whole = Below()
    for name, below in parts:
        whole.files += [f"{name}/{file}" for file in below.files]
        whole.left_out += below.left_out
        whole.circles += [f"{name}/{link}" for link in below.circles]
        whole.closed += [f"{name}/{closed}" for closed in below.closed]
    return whole
