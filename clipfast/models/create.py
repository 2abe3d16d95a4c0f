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
    config = get_config(name_or_config)
    if weights is None:
        with torch.device(device or "cpu"):
            return CLIP(config).to(dtype)
    # every weight comes from the file or the load fails: none need be drawn first
    with torch.device("meta"):
        model = CLIP(config).to(dtype)
    model.to_empty(device=device or "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):  # the one kind that older checkpoints lack
            buffer.zero_()
    return load_weights(model, weights)
