"""A trained model from what a user types: a name with weights, a checkpoint, or the folder of a training run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.models.checkpoint_files import read_content
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig, get_config, list_models
from clipfast.models.create import create_model

# what a training run leaves in its folder, the best first
_RUN_CONFIG = "model.json"
_RUN_WEIGHTS = ("model.safetensors", "checkpoint.pt")


def open_model(
    spec: str | os.PathLike[str],
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> CLIP:
    """Load a trained model for inference. Nothing is downloaded, and no code of a file is run.

    Args:
        spec: One of

            - a name of :func:`clipfast.list_models`, or a ``.json`` file with a configuration, with ``weights``;
            - a checkpoint that clipfast saved, which holds its configuration;
            - the folder of a training run: ``model.json`` with ``model.safetensors`` or ``checkpoint.pt``; or with
              ``weights``.
        weights: A file or folder for :func:`clipfast.load_weights`.
        device: For :func:`find_device`.
        dtype: Of its parameters; float32 by default.

    Returns:
        The model in ``eval()``, its parameters frozen.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown name, no weights, weights beside a checkpoint, or files that are corrupt or do not fit.
    """
    target = find_device(device)
    config, state = _find(os.fspath(spec), weights)
    model = create_model(config, weights=state, device=target, dtype=dtype)
    return model.eval().requires_grad_(False)


def find_device(name: str) -> torch.device:
    """Return the device of ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: CUDA where there is one.

    Raises:
        ValueError: Another name, or CUDA where PyTorch finds none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"device: got {name!r}, expected 'cpu', 'cuda', 'cuda:1' or 'auto'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, expected 'cpu': PyTorch finds no CUDA device here")
    if index and kind == "cuda" and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device: got {name!r}, expected one of the {torch.cuda.device_count()} CUDA devices here")
    return torch.device(name)


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return a SHA-256 of names, dtypes, shapes and bits, the same on every device."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _find(
    spec: str, weights: str | os.PathLike[str] | None
) -> tuple[CLIPConfig, str | os.PathLike[str] | Mapping[str, Tensor]]:
    path = Path(spec)
    if path.is_dir():
        return _config_of_run(path), weights or _weights_of_run(path)
    if spec in list_models() or spec.endswith(".json"):
        if not weights:
            raise ValueError(f"weights: got none for {spec}, expected a file of weights: --weights FILE")
        if spec not in list_models() and not path.is_file():
            raise FileNotFoundError(f"model: got {spec}, expected a configuration's file: there is none")
        return _config_of(path) if spec.endswith(".json") else get_config(spec), weights
    if not path.is_file():
        if "/" not in spec and not path.suffix:
            get_config(spec)  # an unknown name: says which are near
        raise FileNotFoundError(
            f"model: got {spec}, expected a checkpoint, the folder of a run, a .json configuration, or a name of "
            f"clipfast.list_models(): there is no such file"
        )
    if weights:
        raise ValueError(f"weights: got {os.fspath(weights)} beside {spec}, expected none: a checkpoint holds its own")
    return _open_checkpoint(path)


def _open_checkpoint(path: Path) -> tuple[CLIPConfig, Mapping[str, Tensor]]:
    content = read_content(path)
    keys = {"config", "model"}
    if not isinstance(content, Mapping) or not keys <= content.keys() or not isinstance(content["config"], Mapping):
        raise ValueError(
            f"model: got {path}, expected a checkpoint that clipfast saved, with its configuration; give weights "
            f"alone as --weights, beside the model's name"
        )
    return CLIPConfig.from_dict(content["config"]), content["model"]


def _config_of_run(folder: Path) -> CLIPConfig:
    path = folder / _RUN_CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"model: got the folder {folder}, expected {_RUN_CONFIG} in it, as training leaves it")
    return _config_of(path)


def _config_of(path: Path) -> CLIPConfig:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"got {type(values).__name__}, expected an object")
        return CLIPConfig.from_dict(values.get("model_cfg", values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"model: {path} is no configuration: {error}") from error


def _weights_of_run(folder: Path) -> Path:
    for name in _RUN_WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"model: got the folder {folder}, expected {' or '.join(_RUN_WEIGHTS)} in it, or --weights")
