"""Pictures and texts as a model takes them."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from clipfast.data.options import DataOptions
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.transform import image_transform, load_image
from clipfast.models.clip import CLIP


def picture_loader(model: CLIP, options: DataOptions | None = None) -> Callable[[bytes | Image.Image], Tensor]:
    """Return what decodes a picture, or the bytes of its file, and makes it the model's input ``[3, H, W]``."""
    transform = image_transform(model.config.vision_cfg.image_size, **(options or DataOptions()).of_pictures())
    return lambda picture: transform(load_image(picture) if isinstance(picture, bytes) else picture)


def tokenizer_of(model: CLIP) -> Tokenizer:
    """Return CLIP's tokenizer with the model's context; longer texts are cut, as CLIP does.

    Raises:
        ValueError: The model's vocabulary is not CLIP's.
    """
    tokenizer = Tokenizer(context_length=model.context_length)
    vocabulary, expected = model.config.text_cfg.vocab_size, tokenizer.vocab_size
    if vocabulary != expected:
        raise ValueError(f"model: got a vocabulary of {vocabulary}, expected CLIP's {expected} to read texts")
    return tokenizer


def image_size_of(model: CLIP) -> tuple[int, int]:
    """Return the ``(height, width)`` of the model's input."""
    size = model.config.vision_cfg.image_size
    return (size, size) if isinstance(size, int) else size
