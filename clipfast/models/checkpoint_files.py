"""Reading and writing files of weights: tensors only, never code."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from clipfast.files import write_atomically
from clipfast.models.misfits import listed
from clipfast.models.npz import NpzError, is_npz, read_npz, write_npz
from clipfast.models.safe_pickle import NumPyArray, load_plain
from clipfast.models.torchscript_archive import is_torchscript_archive, read_torchscript_archive
from clipfast.models.wrappers import unwrapped

NAMES_IN_FOLDERS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
INDEXES_IN_FOLDERS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from safetensors, ``torch.save``'s format, NumPy's .npz or OpenAI's TorchScript archives.

    Args:
        path: The file, told by its content; the index of a sharded checkpoint; or a folder that holds a file or an
            index named as transformers and open_clip do. Training checkpoints are looked into
            (:func:`~clipfast.models.wrappers.unwrapped`).

    Returns:
        Tensors on the CPU by key, in their own dtypes.

    Raises:
        FileNotFoundError: There is no such file, none of the known names in the folder, or a shard is missing.
        ValueError: The file is corrupt or truncated, holds something else than tensors, or no state dict.
    """
    file = _file_of(Path(path))
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    return tensors_of(read_content(file), str(file))


def read_content(file: Path) -> Any:
    """Return what a file of :func:`read_state_dict`'s formats holds: tensors, containers and plain values.

    Raises:
        ValueError: The file is corrupt or truncated, or refers to anything else; its code is not run.
    """
    try:
        if _is_safetensors(file):
            return safetensors.torch.load_file(file)
        if is_torchscript_archive(file):
            return read_torchscript_archive(file)
        if is_npz(file):
            return read_npz(file)
        return load_plain(file)
    except (FileNotFoundError, PermissionError, MemoryError, NpzError):
        raise
    except Exception as error:  # there is nothing that a damaged pickle does not make its readers raise
        raise ValueError(f"{file}: {_reason(error)}") from error


def tensors_of(content: Any, source: str) -> dict[str, Tensor]:
    """Return the state dict that ``content`` is or, as training checkpoints do, holds.

    Raises:
        ValueError: It is no state dict: no mapping, empty, or with entries that are no dense tensors by name.
    """
    content = unwrapped(content)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source}: got {type(content).__name__}, expected a state dict")
    if not content:
        raise ValueError(f"{source}: got no entries, expected a state dict")
    wrong = [f"{k!r}: {_kind(v)}" for k, v in content.items() if not isinstance(k, str) or _kind(v) != "tensor"]
    if wrong:
        raise ValueError(f"{source}: got {listed(wrong)}, expected a state dict: dense tensors by name")
    return dict(content)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless :func:`write_state_dict` knows the ending of ``path``."""
    if Path(path).suffix not in (".safetensors", ".pt", ".bin", ".npz"):
        raise ValueError(
            f"path: got {os.fspath(path)!r}, expected a name that ends with .safetensors, .pt, .bin or .npz"
        )


def write_state_dict(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict to a ``.safetensors``, ``.pt``, ``.bin`` or ``.npz`` file, at once or not at all.

    Tensors that share memory are written as if they did not.

    Raises:
        ValueError: ``path`` has another ending.
    """
    check_target(path)
    path = Path(path)
    if path.suffix == ".npz":
        write_npz(state, path)
        return
    state = _apart(state)
    if path.suffix == ".safetensors":
        data = safetensors.torch.save(state, metadata={"format": "pt"})
        write_atomically(path, lambda file: file.write(data))
    else:
        write_atomically(path, lambda file: torch.save(state, file))


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in NAMES_IN_FOLDERS + INDEXES_IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        if (path / ".metadata").is_file():
            raise ValueError(
                f"{path}: got a checkpoint of torch.distributed.checkpoint, expected a file: join its parts by "
                f"torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        raise FileNotFoundError(f"{path}: got a folder without weights, expected one of {', '.join(NAMES_IN_FOLDERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights (nothing is downloaded)")
    return path


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors that an index places in files beside it."""
    places = read_config(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: got no weight_map of keys to files, expected one in an index")
    state: dict[str, Tensor] = {}
    for name in dict.fromkeys(places.values()):
        # an index comes from others: what lies elsewhere is not read for it
        if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
            raise ValueError(f"{index}: got a shard {name!r}, expected the name of a file in the same folder")
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard}: there is no such shard, which {index.name} names")
        held = tensors_of(read_content(shard), str(shard))
        keys = [key for key, place in places.items() if place == name]
        missing = [key for key in keys if key not in held]
        if missing:
            raise ValueError(f"{shard}: got no {listed(missing)}, expected what {index.name} places there")
        state.update((key, held[key]) for key in keys)
    return state


def _is_safetensors(file: Path) -> bool:
    """Tell by the name, or by the header: eight bytes of length, then JSON."""
    with file.open("rb") as opened:
        return file.suffix == ".safetensors" or opened.read(9)[8:] == b"{"


def _reason(error: Exception) -> str:
    """Say in one line what is wrong with a file, without PyTorch's advice to trust it."""
    foreign = re.search(r"GLOBAL (\S+\.\w+)", str(error))
    if foreign:
        return f"refers to {foreign[1]}, expected tensors and plain values only: code in a file is never run"
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    first_line = text.splitlines()[0] if text else "ends too early"
    return f"corrupt, truncated, or no file of weights ({type(error).__name__}: {first_line})"


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "NumPy array" if isinstance(value, NumPyArray) else type(value).__name__
    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        return f"{'quantized' if value.is_quantized else value.layout} tensor on {value.device}"
    return "tensor"


def read_config(file: Path) -> dict[str, Any]:
    """Return a JSON file's object; an empty one where there is no file or it holds something else.

    Raises:
        ValueError: The file is not JSON.
    """
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: corrupt, expected a configuration in JSON ({error})") from error
    return config if isinstance(config, dict) else {}


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors in host memory, each of which is all of its storage."""
    taken: set[int] = set()
    apart = {}
    for key, value in state.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage()
        # safetensors refuses shared memory, and torch.save would write a view's whole storage
        if storage.data_ptr() in taken or storage.nbytes() != value.nbytes:
            value = value.clone()
        taken.add(value.untyped_storage().data_ptr())
        apart[key] = value
    return apart
