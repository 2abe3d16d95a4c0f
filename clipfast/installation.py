"""Where clipfast was imported from, and the command that installs it again. It needs the standard library alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

_PACKAGE = Path(__file__).resolve().parent
# what pyproject.toml asks for, by the names that are imported
_NEEDED = {name: name for name in ("torch", "numpy", "safetensors", "tokenizers", "ftfy", "typer", "tomli")}
_NEEDED |= {"PIL": "pillow", "click": "typer", "rich": "typer"}


def clone() -> Path | None:
    """Return the folder of the sources that clipfast is imported from, or None where it is installed elsewhere."""
    root = _PACKAGE.parent
    return root if (root / "setup.py").is_file() and (root / "csrc").is_dir() else None


def command() -> str:
    """Return what builds and installs clipfast again, to stand behind the word "run"."""
    root = clone()
    if root is not None:
        return f"`pip install -e {_named(root)}`"
    source = _source()
    # PyTorch stays what it is, and no wheel that was made before is taken for a new one
    again = "pip install --force-reinstall --no-deps --no-cache-dir"
    return f"`{again} .` in a clone of clipfast" if source is None else f"`{again} {source}`"


def other_built() -> Path | None:
    """Return another folder on Python's path that holds clipfast with its op library, or None.

    It is what was installed, where Python was started in a clone and finds the clone's package first.
    """
    for entry in sys.path:
        found = Path(entry or ".", "clipfast")
        if (found / "__init__.py").is_file() and (found / "libclipfast.so").is_file() and found.resolve() != _PACKAGE:
            return found.resolve()
    return None


def what_is_missing(error: BaseException) -> str | None:
    """Return which of clipfast's requirements an import did not find and what to run, or None for another error."""
    if not isinstance(error, ModuleNotFoundError) or error.name not in _NEEDED:
        return None
    name, root = _NEEDED[error.name], clone()
    if root is None:
        return f"clipfast needs {name}, which is not installed: run `pip install {name}`"
    here = f"clipfast runs from its sources in {root} and needs {name}, which is not installed"
    # the op library is built with the headers of the PyTorch that is there
    first = "" if importlib.util.find_spec("torch") else "install PyTorch (2.10 or newer), then "
    return f"{here}: {first}run {command()}"


def _named(folder: Path) -> str:
    return "." if folder == Path.cwd() else shlex.quote(str(folder))


def _source() -> str | None:
    """Return what pip was asked to install, where that can be built again: a folder or a repository."""
    for distribution in importlib.metadata.distributions(name="clipfast"):
        if Path(distribution.locate_file("clipfast")).resolve() == _PACKAGE:
            return _of_record(distribution.read_text("direct_url.json"))
    return None


def _of_record(written: str | None) -> str | None:
    try:
        record: Any = json.loads(written or "{}")
        url = record.get("url", "")
        if "vcs_info" in record:
            return shlex.quote(f"{record['vcs_info']['vcs']}+{url}")
        folder = Path(url2pathname(urlsplit(url).path))
        return _named(folder) if "dir_info" in record and folder.is_dir() else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
