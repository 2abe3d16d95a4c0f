"""Reading the tensors of a TorchScript archive, OpenAI's format, without running its code.

``torch.jit.load`` compiles and may run the code that an archive holds. Here only its pickled attributes are read,
by an unpickler that knows tensors, containers and inert stand-ins for the archive's classes, and refuses the rest.
"""

from __future__ import annotations

import collections
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def is_torchscript_archive(path: Path) -> bool:
    """Tell a TorchScript archive by its members: pickled attributes beside code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    return "data.pkl" in names and "constants.pkl" in names


def read_torchscript_archive(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a TorchScript archive under the names that its modules give them.

    Raises:
        pickle.UnpicklingError: The archive refers to anything but tensors, containers and its own classes.
        Exception: Whatever a damaged zip file or pickle makes their readers raise.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(n for n in archive.namelist() if n.endswith("/data.pkl")).removesuffix("data.pkl")
        with archive.open(root + "data.pkl") as file:
            module = _Unpickler(file, lambda key: archive.read(f"{root}data/{key}")).load()
    tensors: dict[str, Tensor] = {}
    _collect(module, "", tensors)
    return tensors


class _ScriptObject:
    """Stands in for a class of the archive; keeps its attributes and nothing else."""

    def __setstate__(self, attributes: Any) -> None:
        self.attributes = attributes if isinstance(attributes, dict) else {}


# a storage class is read as the dtype that it stands for
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def _rebuild_tensor(storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    return storage.as_strided(size, stride, offset)


def _untyped(value: Any, _type: str = "") -> Any:
    return value


# TorchScript wraps lists and dicts in calls that tell their type, which tensors need not
_TYPE_MARKS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag")

_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    **{("torch.jit._pickle", name): _untyped for name in _TYPE_MARKS},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, read: Callable[[str], bytes]) -> None:
        super().__init__(file)
        self._read = read
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _ScriptObject
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"unsupported GLOBAL {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, _ = pid
        if key not in self._storages:
            data = bytearray(self._read(key))
            self._storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self._storages[key]


def _collect(value: Any, prefix: str, tensors: dict[str, Tensor]) -> None:
    if isinstance(value, Tensor):
        tensors[prefix.rstrip(".")] = value
    elif isinstance(value, _ScriptObject):
        for name, attribute in value.attributes.items():
            _collect(attribute, f"{prefix}{name}.", tensors)
