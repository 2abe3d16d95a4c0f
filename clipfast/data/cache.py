"""The cache folder, and files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where drawn pictures are kept: ``$CLIPFAST_CACHE``, or ``$XDG_CACHE_HOME/clipfast``, or ``~/.cache/clipfast``.

    The folder need not exist. See the XDG base directory specification.

    Raises:
        OSError: there is no home folder and neither variable is set.
    """
    if own := os.environ.get("CLIPFAST_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "clipfast"
    try:
        return Path.home() / ".cache" / "clipfast"
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}; set CLIPFAST_CACHE") from error


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open ``path`` for writing such that it holds all that was written, or stays as it was.

    Written beside the target, synced to disk, then renamed over it: neither a crash nor a full disk
    leaves half a file under the target's name. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # the process number keeps two writers of one target apart
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
