"""Models by name."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.hints import keywords_told
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig
from clipfast.models.foreign_config import config_of
from clipfast.models.hub_names import HOW_TO_FETCH
from clipfast.models.weights import load_weights
from clipfast.modules.vit import ViT


@keywords_told
def create_model(
    name_or_config: str | os.PathLike[str] | CLIPConfig | Mapping[str, Any],
    *,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    pretrained: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    image_size: int | tuple[int, int] | None = None,
    context_length: int | None = None,
    text_positions: str = "linear",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> CLIP:
    """Create a CLIP model.

    Args:
        name_or_config: A name of :func:`clipfast.list_models`, a :class:`CLIPConfig`, a dict with its keys (open_clip's
            configuration files have them), the path of a JSON file of these or of transformers' configuration,
            or the folder of this project's, open_clip's or transformers' model
            (:func:`~clipfast.models.foreign_config.folder_config`).
        weights: A file, a folder or a state dict for :func:`clipfast.load_weights`; None draws weights as open_clip
            does, also where ``name_or_config`` is a folder.
        pretrained: The same by open_clip's name. A file: names of weights to be downloaded are refused.
        image_size: Pixels a side, or ``(height, width)``, in the place of the configuration's. Position embeddings of
            ``weights`` are resampled.
        context_length: The longest caption, in tokens, in the place of the configuration's. Position embeddings of
            ``weights`` are resampled.
        text_positions: How, for another context length: ``"linear"`` as open_clip does, or ``"longclip"``; see
            :func:`clipfast.load_weights`.
        device: Where the model lives; the CPU by default.
        dtype: The dtype of its floating-point parameters; float32 by default.

    Returns:
        The model, in training mode as every new module; call ``.eval()`` for inference.

    Raises:
        TypeError: ``name_or_config`` is of another type, or a configuration field is.
        FileNotFoundError: A folder without a configuration, or weights that are not there.
        ValueError: An unknown name (the nearest is suggested), an unknown configuration key, a folder's configuration
            that clipfast does not compute, or weights that do not fit.
    """
    if pretrained:
        if weights is not None:
            raise ValueError("pretrained: got it beside weights, expected one of them")
        weights = _file_of(pretrained)
    named = config_of(name_or_config)
    config = _resized(named, image_size, context_length)
    if text_positions != "linear" and config.text_cfg == named.text_cfg:
        raise ValueError(f"text_positions: got {text_positions!r} without another context_length, expected one with it")
    if weights is None:
        with torch.device(device or "cpu"):
            model = CLIP(config).to(dtype)
        return _knowing_grid(model, named)
    # every weight comes from the file or the load fails: none need be drawn first
    with torch.device("meta"):
        model = CLIP(config).to(dtype)
    model.to_empty(device=device or "cpu")
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):  # the one kind that older checkpoints lack
            buffer.zero_()
    _knowing_grid(model, named)
    image, text = config.vision_cfg != named.vision_cfg, config.text_cfg != named.text_cfg
    resize = True if image and text else "image" if image else "text" if text else False
    return load_weights(model, weights, resize=resize, text_positions=text_positions)


def _file_of(pretrained: str | os.PathLike[str] | Mapping[str, Tensor]) -> Any:
    """Return what holds weights; refuse what open_clip would download."""
    if isinstance(pretrained, Mapping) or Path(pretrained).exists():
        return pretrained
    raise FileNotFoundError(
        f"pretrained: got {os.fspath(pretrained)!r}, expected a file or folder of weights: there is none of that name, "
        f"and nothing is downloaded. {HOW_TO_FETCH}"
    )


def _resized(config: CLIPConfig, image_size: int | tuple[int, int] | None, context_length: int | None) -> CLIPConfig:
    if image_size is not None:
        if isinstance(image_size, list):
            image_size = tuple(image_size)
        config = replace(config, vision_cfg=replace(config.vision_cfg, image_size=image_size))
    if context_length is not None:
        if not isinstance(context_length, int) or context_length < 1:
            raise ValueError(f"context_length: got {context_length!r}, expected a number of tokens, at least 1")
        config = replace(config, text_cfg=replace(config.text_cfg, context_length=context_length))
    return config


def _knowing_grid(model: CLIP, named: CLIPConfig) -> CLIP:
    """Tell a ViT of another image size than its name's which grid its weights come in."""
    if isinstance(model.visual, ViT) and named.vision_cfg != model.config.vision_cfg:
        size, patch = named.vision_cfg.image_size, model.visual.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        model.visual.weights_grid = (height // patch, width // patch)
    return model
