"""Pictures and texts as a model takes them."""

from __future__ import annotations

import os
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from clipfast.data.choose_tokenizer import tokenizer_for
from clipfast.data.options import DataOptions
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.data.transform import image_transform, load_image
from clipfast.models.clip import CLIP


def picture_loader(model: CLIP, options: DataOptions | None = None) -> Callable[[bytes | Image.Image], Tensor]:
    """Return what decodes a picture, or the bytes of its file, and makes it the model's input ``[3, H, W]``."""
    transform = image_transform(model.config.vision_cfg.image_size, **(options or DataOptions()).of_pictures())
    return lambda picture: transform(load_image(picture) if isinstance(picture, bytes) else picture)


def tokenizer_of(model: CLIP, tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None) -> AnyTokenizer:
    """Return what reads texts for a model: :func:`clipfast.data.choose_tokenizer.tokenizer_for` its configuration."""
    return tokenizer_for(model.config.text_cfg, tokenizer)


def image_size_of(model: CLIP) -> tuple[int, int]:
    """Return the ``(height, width)`` of the model's input."""
    size = model.config.vision_cfg.image_size
    return (size, size) if isinstance(size, int) else size
