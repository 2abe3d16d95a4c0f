"""The folder for what is made once and kept."""

from __future__ import annotations

import os
from pathlib import Path


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
