"""Checkpoints of training runs: written whole or not at all, read without running code from the file."""

from __future__ import annotations

import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.files import write_atomically
from clipfast.models.clip import CLIP

_FORMAT = "clipfast.checkpoint.1"


@dataclass(frozen=True)
class Checkpoint:
    """A point in a training run.

    Attributes:
        step: Optimizer steps taken.
        config: The model's configuration, for :func:`clipfast.create_model`.
        model: The model's state dict, on the CPU.
        optimizer: The optimizer's state dict, or None if it was not kept.
    """

    step: int
    config: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None


def save_checkpoint(
    path: str | os.PathLike[str], model: CLIP, *, step: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Write a checkpoint, syncing it to disk before it takes the place of one of the same name.

    :func:`clipfast.load_weights` reads these files too.
    """
    content = {
        "format": _FORMAT,
        "step": step,
        "config": model.config.to_dict(),
        "model": model.state_dict(),
        "optimizer": None if optimizer is None else optimizer.state_dict(),
    }
    write_atomically(Path(path), lambda file: torch.save(content, file))


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint of :func:`save_checkpoint`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt or truncated, holds more than tensors and plain values, or is something else
            than a clipfast checkpoint.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path}: corrupt, truncated, or holds more than tensors (which is never loaded): {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ValueError(f"{path}: got no {_FORMAT!r}, expected a file that clipfast saved as a checkpoint")
    return Checkpoint(content["step"], content["config"], content["model"], content["optimizer"])
