"""Models by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig, get_config
from clipfast.models.weights import load_weights


def create_model(
    name_or_config: str | os.PathLike[str] | CLIPConfig | Mapping[str, Any],
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CLIP:
    """Create a CLIP model.

    Args:
        name_or_config: A name of :func:`clipfast.list_models`, a :class:`CLIPConfig`, a dict with its keys (open_clip's
            configuration files have them), or the path of a JSON file of these.
        weights: A file or a state dict for :func:`clipfast.load_weights`; None draws weights as open_clip does.
        device: Where the model lives; the CPU by default.
        dtype: The dtype of its floating-point parameters; float32 by default.

    Returns:
        The model, in training mode as every new module; call ``.eval()`` for inference.

    Raises:
        TypeError: ``name_or_config`` is of another type, or a configuration field is.
        ValueError: An unknown name (the nearest is suggested), an unknown configuration key, or weights that do not
            fit.
    """
    with torch.device(device or "cpu"):
        model = CLIP(get_config(name_or_config))
    if dtype is not None:
        model = model.to(dtype)
    return model if weights is None else load_weights(model, weights)
