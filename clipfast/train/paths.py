"""Paths among the settings of a run: those in a TOML file start from its folder, wherever the command runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_DATA = ("data", "val_data")
_MODELS = ("model", "distill_model")
_FILES = ("output", "weights", "tokenizer", "distill_weights")
#: The settings that may be paths.
PATHS = (*_DATA, *_MODELS, *_FILES, "resume")


def start_from(settings: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return settings whose relative paths start from a folder, as absolute ones.

    What is no path stays as it is: names of models and of data sets that packages bring, addresses such as ``s3://``,
    ``resume``'s ``auto`` and ``never``, and values of another type. A data set's name is a path where something of that
    name lies in the folder.
    """
    from clipfast.data.patterns import anchored, anchored_path  # not for `clipfast train --help`

    started = dict(settings)
    for name, value in settings.items():
        if isinstance(value, str) and _is_path(name, value, Path(folder)):
            # of data alone a path may be a pattern
            started[name] = (anchored if name in _DATA else anchored_path)(value, folder)
    return started


def _is_path(name: str, value: str, folder: Path) -> bool:
    from clipfast.data.shipped import SHIPPED
    from clipfast.models.config import list_models
    from clipfast.models.hub_names import HUB

    if not value.strip():
        return False
    if name in _DATA:
        return value not in SHIPPED or (folder / value).exists()
    if name in _MODELS:
        # a name with a slip in it is not a path either, nor is a model hub's: the error says what it is
        if value.startswith(HUB) or value in list_models():
            return False
        return "/" in value or value.endswith(".json") or (folder / value).exists()
    return name in _FILES or (name == "resume" and value not in ("auto", "never"))


def shown(path: str | os.PathLike[str]) -> str:
    """Return a path as a person here would type it: from the working folder, where it lies below that."""
    text, here = os.fspath(path), os.getcwd()
    return os.path.relpath(text, here) if text.startswith(here + os.sep) else text
