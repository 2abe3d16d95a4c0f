"""NumPy's .npz files as state dicts, big_vision's format: numbers only, never code."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from clipfast.files import write_atomically

# how NumPy writes a bfloat16 that a package adds to it: two bytes without a meaning
_BFLOAT16 = np.dtype("V2")


def is_npz(file: Path) -> bool:
    """Tell whether a file is NumPy's .npz by its name, or by what it holds: a zip archive of arrays alone."""
    if file.suffix == ".npz":
        return True
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def read_npz(file: Path) -> dict[str, Tensor]:
    """Read the arrays of an .npz file, each as a tensor of its own dtype; two bytes without a meaning are bfloat16.

    Raises:
        NpzError: The file is corrupt or truncated, or holds anything else than arrays of numbers. What is pickled
            in it is not loaded.
    """
    state: dict[str, Tensor] = {}
    place = ""
    try:
        with zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                place = f" in {name}"
                if name == info.filename:
                    raise _ContentError(f"got {name!r}, expected arrays (.npy) alone")
                if name in state:
                    raise _ContentError(f"got two arrays {name!r}, expected one")
                with archive.open(info) as opened:
                    state[name] = _tensor(_read_array(opened, info.file_size))
    except (FileNotFoundError, PermissionError, MemoryError):
        raise
    except _ContentError as error:
        raise NpzError(f"{file}: {error}{place}") from error
    except Exception as error:  # zipfile and its decompressors raise of all kinds for what is damaged
        raise NpzError(f"{file}: corrupt or truncated, expected an .npz of arrays ({error}{place})") from error
    return state


class NpzError(ValueError):
    """An .npz file that is corrupt, or of something else than arrays of numbers."""


class _ContentError(Exception):
    """An archive that can be read, of something else than arrays of numbers."""


def _read_array(opened: IO[bytes], size: int) -> np.ndarray:
    """Read an array whose header and numbers are ``size`` bytes."""
    try:
        version = np.lib.format.read_magic(opened)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(opened)
    except ValueError as error:
        raise _ContentError(f"corrupt, expected the header of an array ({error})") from error
    if dtype.hasobject:
        raise _ContentError("got pickled objects, expected numbers (code in a file is never run)")
    if dtype.kind not in "biuf" and dtype != _BFLOAT16:
        raise _ContentError(f"got an array of {dtype}, expected numbers")
    # a header may claim anything: no room is made for more than the archive holds
    length = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or length > size:
        raise _ContentError(f"corrupt: got {size} bytes for an array {shape} of {dtype}")
    data = bytearray(length)
    if opened.readinto(data) != length or opened.read(1):
        raise _ContentError(f"corrupt: got more or fewer bytes than an array {shape} of {dtype} has")
    return np.ndarray(shape, dtype, data, order="F" if fortran else "C")


def _tensor(array: np.ndarray) -> Tensor:
    if array.dtype == _BFLOAT16:
        return torch.from_numpy(np.asarray(array, order="C").view(np.int16)).view(torch.bfloat16)
    try:
        return torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise _ContentError(f"got an array of {array.dtype}, expected a dtype that PyTorch has") from error


def write_npz(state: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as an .npz file, at once or not at all; bfloat16 as two bytes without a meaning, as JAX does."""
    arrays = {key: _array(value.detach().cpu().contiguous()) for key, value in state.items()}
    write_atomically(path, lambda file: np.savez(file, **arrays))


def _array(value: Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        return value.view(torch.int16).numpy().view(_BFLOAT16)
    return value.numpy()
