"""Files that are either whole or not there, and the folder for those that are made once and kept."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def cache_folder() -> Path:
    """Where what can be made again is kept: ``$CLIPFAST_CACHE``, ``$XDG_CACHE_HOME/clipfast`` or ``~/.cache/clipfast``.

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


def short(path: Path) -> str:
    """Return a path without the name of its user."""
    home = os.path.expanduser("~")
    text = str(path)
    return f"~{text[len(home) :]}" if home != "/" and text.startswith(home + os.sep) else text


def path_text(path: str | os.PathLike[str], argument: str) -> str:
    """Return a path, or a name in its place, as text.

    Raises:
        TypeError: It is neither text nor a path; ``argument`` names it.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"{argument}: got {type(path).__name__}, expected a path or a name as text")
    return os.fspath(path)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that takes the place of ``path`` once it is whole and on disk.

    Whatever goes wrong before leaves ``path`` as it was. Folders on the way are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    opened = part.open("xb")
    try:
        with opened as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk, on systems that can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
