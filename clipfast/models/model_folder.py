"""A trained model as a folder: ``model.json``, its configuration, and ``model.safetensors``, its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from clipfast.files import write_atomically
from clipfast.models.config import CLIPConfig

CONFIG_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"


def write_model_folder(folder: Path, config: CLIPConfig, weights: Mapping[str, Tensor]) -> None:
    """Write a model's configuration and weights, each whole or not at all.

    Args:
        folder: Where to; made if it is missing.
        config: The configuration, for :func:`clipfast.create_model`.
        weights: The state dict, on the CPU.
    """
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_atomically(folder / CONFIG_FILE, lambda file: file.write(text.encode()))
    data = save({name: value.contiguous() for name, value in weights.items()})
    write_atomically(folder / WEIGHTS_FILE, lambda file: file.write(data))
