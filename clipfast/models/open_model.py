"""A trained model from what a user types: a name with weights, or the folder of a training run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig, get_config, list_models
from clipfast.models.create import create_model
from clipfast.models.foreign_config import config_of, folder_config
from clipfast.models.hub_names import HUB, refuse_hub_name
from clipfast.models.model_folder import CONFIG_FILE, WEIGHTS_FILE

#: What the commands and open_clip call dtypes of weights.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
            - the folder of a training run: ``model.json`` with ``model.safetensors``, or with ``weights``;
            - the folder of an open_clip or transformers model: ``open_clip_config.json`` or ``config.json`` with its
              weights, or with ``weights``.
        weights: A file or folder for :func:`clipfast.load_weights`.
        device: For :func:`find_device`.
        dtype: Of its parameters; float32 by default.

    Returns:
        The model in ``eval()``, its parameters frozen.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An unknown name, no weights, or files that are corrupt or do not fit.
    """
    target = find_device(device)
    config, state = _find(os.fspath(spec), weights)
    model = create_model(config, weights=state, device=target, dtype=dtype)
    return model.eval().requires_grad_(False)


def find_device(name: str, local_rank: int | None = None) -> torch.device:
    """Return the device of ``"cpu"``, ``"cuda"``, ``"cuda:1"``, or ``"auto"``: CUDA where there is one.

    Where a machine runs several ranks, ``"cuda"`` is the device of this one's ``local_rank``.

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
    return (
        torch.device(kind, local_rank)
        if kind == "cuda" and not index and local_rank is not None
        else torch.device(name)
    )


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
        return folder_config(path, training=False), weights or _weights_of(path)
    if spec in list_models() or spec.endswith(".json"):
        if not weights:
            raise ValueError(f"weights: got none for {spec}, expected a file of weights: --weights FILE")
        if spec not in list_models() and not path.is_file():
            raise FileNotFoundError(f"model: got {spec}, expected a configuration's file: there is none")
        return config_of(spec, training=False), weights
    if "/" not in spec and not path.suffix:
        get_config(spec)  # an unknown name: says which are near
    if spec.startswith(HUB):  # another name with a slash is rather a folder's that was mistyped
        refuse_hub_name(spec)
    raise FileNotFoundError(
        f"model: got {spec}, expected the folder of a run, of an open_clip or of a transformers model, a .json "
        f"configuration, or a name of clipfast.list_models(); weights alone go to --weights, beside the model's name"
    )


def _weights_of(folder: Path) -> Path:
    """Return the run's weights, or the folder, where another library's lie."""
    if not (folder / CONFIG_FILE).is_file():
        return folder
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"model: got the folder {folder}, expected {WEIGHTS_FILE} in it, or --weights")
    return folder / WEIGHTS_FILE
