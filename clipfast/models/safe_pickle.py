"""Reading ``torch.save``'s files: tensors and plain values, and NumPy's values as such. Code is never run.

Training loops put NumPy scalars (losses, learning rates), NumPy arrays (states of random generators) and parsed
arguments beside weights. PyTorch's safe unpickler refuses them. Here it reads them by stand-ins, which call nothing of
NumPy's unpickling and hold what they were given.
"""

from __future__ import annotations

import argparse
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch

# the allowances below hold for the process while a file is read
_lock = threading.Lock()


class _Dtype:
    """Stands in for ``numpy.dtype``; keeps the code and the order of bytes."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class NumPyArray:
    """Stands in for a NumPy array, whose values nobody reads."""

    def __setstate__(self, state: Any) -> None:
        pass


def _scalar(dtype: _Dtype, data: bytes = b"") -> bool | int | float | complex | str | None:
    """Return a NumPy scalar as a plain value; None for kinds that have none."""
    if not (isinstance(dtype, _Dtype) and isinstance(data, bytes) and re.fullmatch(r"[biufcSU]\d+", str(dtype.code))):
        return None
    order = dtype.order if dtype.order in ("<", ">") else "="
    values = np.frombuffer(data, dtype=order + dtype.code)
    return values[0].item() if values.size == 1 else None


def _reconstruct(*_: Any) -> NumPyArray:
    return NumPyArray()


_STAND_INS: list[Any] = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (NumPyArray, "numpy.ndarray"),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((_scalar, "scalar"), (_reconstruct, "_reconstruct"))
    ),
]


def load_plain(file: Path) -> Any:
    """Return what a file of ``torch.save``'s holds, on the CPU; NumPy's scalars as Python's.

    Raises:
        Exception: As ``torch.load(weights_only=True)``, for whatever refers to anything else or is damaged.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if "numpy." not in str(error) and "argparse.Namespace" not in str(error):
            raise
    with _lock, torch.serialization.safe_globals(_STAND_INS):
        return torch.load(file, map_location="cpu", weights_only=True)
