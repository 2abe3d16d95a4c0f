"""Pictures to NaFlex's input, with Pillow and torch alone: the same numbers as transformers' SigLIP 2 processor.

A picture keeps its aspect as far as whole patches let it: it is scaled, up or down, to the most patches that a budget
allows, and cut into them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from clipfast.data.transform import MAX_PIXELS, OfPictures, check_numbers, normalise_, random_part, ready_to_resize
from clipfast.models.preprocess import SIGLIP
from clipfast.modules.naflex import Patches, cut

# the scales that are looked among, and how exactly: transformers', so that every picture gets the same grid
_PRECISION = 1e-5
_SCALES = (_PRECISION / 10, 100.0)


def patch_grid(height: int, width: int, max_patches: int, patch_size: int) -> tuple[int, int]:
    """Return the ``(rows, columns)`` of patches that a picture is scaled to: the most that the budget allows.

    Sides are scaled alike, 100 times at the most, and rounded up to whole patches.

    Args:
        height: Of the picture, in pixels.
        width: Of the picture, in pixels.
        max_patches: The budget.
        patch_size: Pixels a patch's side.
    """

    def at(scale: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * scale / patch_size)) for side in (height, width))
        return rows, columns

    low, high = _SCALES
    while high - low >= _PRECISION:
        middle = (low + high) / 2
        if math.prod(at(middle)) <= max_patches:
            low = middle
        else:
            high = middle
    return at(low)


@dataclass(frozen=True)
class NaFlexTransform(OfPictures):
    """See :func:`naflex_transform`, which makes it."""

    max_patches: int = 256
    patch_size: int = 16
    mean: tuple[float, float, float] = field(default=SIGLIP.mean, kw_only=True)
    std: tuple[float, float, float] = field(default=SIGLIP.std, kw_only=True)

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Patches:
        """The picture as float32 patches, normalised; errors as :func:`naflex_transform` says.

        A random part is drawn from `generator`, or from torch's own.
        """
        image = _on_white(ready_to_resize(image, self.max_pixels, self.as_open_clip, self.apply_orientation))
        box = self._random_box(image.size, generator) if self.train else (0, 0, *image.size)
        grid = patch_grid(box[3] - box[1], box[2] - box[0], self.max_patches, self.patch_size)
        rows, columns = grid
        size = columns * self.patch_size, rows * self.patch_size
        image = image.resize(size, Image.Resampling.BILINEAR, box)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        # in transformers' order of roundings
        values = pixels.to(torch.float64).mul_(1 / 255).to(torch.float32)
        return Patches(cut(normalise_(values, self.mean, self.std), self.patch_size), grid)

    def _random_box(self, size: tuple[int, int], generator: torch.Generator | None) -> tuple[int, int, int, int]:
        # of the picture's own shape, more or less
        own = size[0] / size[1]
        left, top, width, height = random_part(size, self.scale, (self.ratio[0] * own, self.ratio[1] * own), generator)
        return left, top, left + width, top + height

    def blank(self) -> Patches:
        """A picture of one patch, all zeros, for the place of one that cannot be read."""
        return Patches(torch.zeros(1, 3 * self.patch_size**2, dtype=torch.float32, device="cpu"), (1, 1))


def naflex_transform(
    max_patches: int = 256,
    patch_size: int = 16,
    *,
    train: bool = False,
    mean: Sequence[float] = SIGLIP.mean,
    std: Sequence[float] = SIGLIP.std,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    max_pixels: int = MAX_PIXELS,
    as_open_clip: bool = False,
    apply_orientation: bool = False,
) -> NaFlexTransform:
    """A callable that turns a PIL picture of any mode into :class:`clipfast.modules.naflex.Patches`.

    Gives the numbers of transformers' ``Siglip2ImageProcessorPil(do_convert_rgb=True)``, bit for bit, without the
    padding, and with the values of a patch in the order of channel, row, column: a picture is turned to RGB, on white
    where it is transparent, scaled bilinearly to the most patches that `max_patches` allows, normalised and cut. Grey
    pictures of 16 bits are scaled to 8, as in :func:`clipfast.image_transform`.

    Args:
        max_patches: the most patches of a picture.
        patch_size: pixels a patch's side.
        train: a random part of the picture, else the whole.
        mean: of red, green and blue, in [0, 1]; subtracted.
        std: of red, green and blue; divided by.
        scale: bounds of a random part's share of the picture's area.
        ratio: bounds of a random part's width / height, over that of the picture.
        max_pixels: the largest picture taken, width × height.
        as_open_clip, apply_orientation: see :func:`clipfast.image_transform`.

    Raises:
        ValueError: an argument out of range. The transform itself raises :class:`clipfast.data.transform.ImageError`
            for a picture that is empty, too large, or, where it was opened but not yet read, truncated or corrupt; and
            `TypeError` for what is not a PIL picture.
    """
    for name, value in (("max_patches", max_patches), ("patch_size", patch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    check_numbers(mean, std, scale, ratio)
    return NaFlexTransform(
        max_patches, patch_size, train=train, mean=tuple(mean), std=tuple(std), scale=tuple(scale), ratio=tuple(ratio),
        max_pixels=max_pixels, as_open_clip=as_open_clip, apply_orientation=apply_orientation,
    )  # fmt: skip


def _on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, white where it is transparent."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
