"""Pictures and texts as a model takes them."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from clipfast.data.choose_tokenizer import tokenizer_beside, tokenizer_for
from clipfast.data.input_transform import transform_of
from clipfast.data.options import DataOptions
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.data.transform import load_image
from clipfast.models.clip import CLIP
from clipfast.models.open_model import open_model
from clipfast.modules.naflex import Patches


def picture_loader(
    model: CLIP, options: DataOptions | None = None
) -> Callable[[bytes | Image.Image], Tensor | Patches]:
    """Return what decodes a picture, or the bytes of its file, and makes it the model's input; see `transform_of`."""
    transform = transform_of(model.config.vision_cfg, options)
    return lambda picture: transform(load_image(picture) if isinstance(picture, bytes) else picture)


def model_and_tokenizer(
    model: CLIP | str | os.PathLike[str],
    tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    device: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[CLIP, AnyTokenizer | str | os.PathLike[str] | None]:
    """Open a model where its folder or name is given, with the tokenizer that lies beside it unless one is given.

    Raises:
        TypeError: It is no model, folder or name.
    """
    if not isinstance(model, (str, os.PathLike)):
        # one that is wrapped or compiled hands on what the model has
        if not hasattr(model, "config"):
            raise TypeError(
                f"model: got {type(model).__name__}, expected a clipfast.CLIP, the folder of a model, or a name"
            )
        return model, tokenizer
    clip = open_model(model, weights, device, dtype)
    return clip, tokenizer_beside(model, clip.config.text_cfg) if tokenizer is None else tokenizer


def tokenizer_of(model: CLIP, tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None) -> AnyTokenizer:
    """Return what reads texts for a model: :func:`clipfast.data.choose_tokenizer.tokenizer_for` its configuration."""
    return tokenizer_for(model.config.text_cfg, tokenizer)


def image_size_of(model: CLIP) -> tuple[int, int]:
    """Return the ``(height, width)`` of the model's input."""
    size = model.config.vision_cfg.image_size
    return (size, size) if isinstance(size, int) else size
