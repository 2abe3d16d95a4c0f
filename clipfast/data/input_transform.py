"""What makes pictures the input of an image tower."""

from __future__ import annotations

import math
from dataclasses import asdict

from clipfast.data.naflex import NaFlexTransform, naflex_transform
from clipfast.data.options import DataOptions
from clipfast.data.transform import ImageTransform, image_transform
from clipfast.models.config import VisionConfig


def transform_of(
    vision: VisionConfig, options: DataOptions | None = None, *, train: bool = False, max_patches: int | None = None
) -> ImageTransform | NaFlexTransform:
    """Return what makes a picture the input of an image tower: ``[3, H, W]``, or patches for one of any aspect.

    Args:
        vision: The tower's sizes.
        options: How pictures are read.
        train: Whether a random part of a picture is taken.
        max_patches: Of a picture of any aspect; by default as many as the tower has positions.
    """
    of_pictures = (options or DataOptions()).of_pictures()
    if not vision.naflex:
        return square_transform_of(vision, vision.image_size, train=train, **of_pictures)
    if max_patches is None:
        size = vision.image_size
        max_patches = math.prod(side // vision.patch_size for side in ((size, size) if isinstance(size, int) else size))
    numbers = vision.preprocess_cfg
    return naflex_transform(
        max_patches, vision.patch_size, train=train, mean=numbers.mean, std=numbers.std, **of_pictures
    )


def square_transform_of(
    vision: VisionConfig, image_size: int | tuple[int, int], *, train: bool = False, **of_pictures: bool
) -> ImageTransform:
    """Return what makes any picture ``[3, H, W]``, as an image tower's weights were trained (its `preprocess_cfg`)."""
    return image_transform(image_size, train, **asdict(vision.preprocess_cfg), **of_pictures)
