"""Reading and writing files of weights: tensors only, never code."""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clipfast.models.torchscript_archive import is_torchscript_archive, read_torchscript_archive

_NAMES_IN_FOLDERS = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
_WRAPPING_KEYS = ("state_dict", "model")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from safetensors, ``torch.save``'s format or OpenAI's TorchScript archives.

    Args:
        path: The file, told by its content, or a folder that holds one file named as transformers and open_clip do.
            Training checkpoints are looked into for ``state_dict`` or ``model``.

    Returns:
        Tensors on the CPU by key, in their own dtypes.

    Raises:
        FileNotFoundError: There is no such file, or none of the known names in the folder.
        ValueError: The file is corrupt or truncated, holds something else than tensors, or no state dict.
    """
    path = _file_of(Path(path))
    try:
        if is_torchscript_archive(path):
            content = read_torchscript_archive(path)
        elif _is_safetensors(path):
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: corrupt, truncated, or holds more than tensors (which is never loaded): {first_line}"
        ) from error
    return _tensors_of(content, path)


def write_state_dict(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a state dict to a ``.safetensors``, ``.pt`` or ``.bin`` file, at once or not at all.

    Raises:
        ValueError: ``path`` has another ending.
    """
    path = Path(path)
    state = {k: v.detach().contiguous() for k, v in state.items()}
    if path.suffix == ".safetensors":
        data = safetensors.torch.save(state, metadata={"format": "pt"})
        write_atomically(path, lambda file: file.write(data))
    elif path.suffix in (".pt", ".bin"):
        write_atomically(path, lambda file: torch.save(state, file))
    else:
        raise ValueError(f"path: got {path.name!r}, expected a name that ends with .safetensors, .pt or .bin")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file that takes the place of ``path`` once it is whole and on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name + ".", suffix=".part", delete=False) as file:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _umask() -> int:
    # it can only be read by being set
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _file_of(path: Path) -> Path:
    if path.is_dir():
        for name in _NAMES_IN_FOLDERS:
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path}: got a folder without weights, expected one of {', '.join(_NAMES_IN_FOLDERS)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of weights (nothing is downloaded)")
    return path


def _is_safetensors(path: Path) -> bool:
    """Tell by the header: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    for key in _WRAPPING_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path}: got {type(content).__name__} without entries, expected a state dict")
    wrong = [f"{k!r}: {type(v).__name__}" for k, v in content.items() if not isinstance(v, Tensor)]
    if wrong:
        raise ValueError(f"{path}: got entries that are no tensors ({', '.join(wrong[:5])}), expected a state dict")
    return dict(content)
