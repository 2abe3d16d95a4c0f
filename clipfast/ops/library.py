"""The compiled op library: loading it when it is first needed, and saying why where it is not there."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent.parent


@functools.cache
def unavailable() -> str | None:
    """Load the op library, once; return None, or why it cannot be used."""
    path = _PACKAGE / "libclipfast.so"
    if not path.exists():
        record = _PACKAGE / "_build.json"
        reason = json.loads(record.read_text())["reason"] if record.exists() else "clipfast was not installed with it"
        return f"the op library was not built: {reason}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the op library does not load: {error.__cause__ or error}"
    return None


def build_info() -> dict[str, str]:
    """Return what the op library was built with: ``compiler``, ``torch_target``, ``cpu`` and ``cuda``.

    Raises:
        RuntimeError: The library is not there or does not load; the message says why.
    """
    reason = unavailable()
    if reason is not None:
        raise RuntimeError(reason)
    return dict(field.split("=", 1) for field in torch.ops.clipfast.build_info().split(";"))
