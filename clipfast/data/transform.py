"""Pictures to CLIP's input, with Pillow and torch alone: the same numbers as open_clip's transforms.

Evaluation resizes the shorter side to the image size and crops the centre; training crops a random part and
resizes that. Both interpolate bicubically in the picture's own mode and turn to RGB last, as open_clip does. Grey
pictures of 16 bits alone differ: there they are scaled, and not cut off at 255 (:mod:`clipfast.data.depth`).
"""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from clipfast.data.depth import to_8_bits
from clipfast.data.pictures import NOT_DECODED
from clipfast.hints import keywords_told
from clipfast.models.preprocess import OPENAI_MEAN, OPENAI_STD, PreprocessConfig

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs: a 24-bit picture of 256 MiB


class ImageError(ValueError):
    """A picture that cannot be used: truncated, corrupt, not a picture at all, empty or too large."""


# --- files ------------------------------------------------------------------------------------------------


def load_image(source: str | os.PathLike[str] | bytes | BinaryIO, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read and decode a picture.

    The picture is returned as it was stored: in its own mode, and not turned as its EXIF orientation says, for
    open_clip turns none either. Of an animation it is the first frame.

    Args:
        source: a path, the bytes of a file, or a binary file object (read from where it stands).
        max_pixels: the largest width × height allowed; checked before anything is decoded.

    Raises:
        ImageError: not a picture, truncated, corrupt, or larger than `max_pixels`.
        TypeError: `source` is none of the above.
        OSError: the file cannot be read (`FileNotFoundError` and its kin).
    """
    data, name = _read(source)
    try:
        image = identify(data)
    except Exception as error:  # a corrupt header can make a decoder raise anything
        raise ImageError(f"{name} has a corrupt header: {error}") from error
    if image is None:
        raise ImageError(f"{name} is not a picture in a format that Pillow reads ({len(data)} bytes)")
    return _decoded(image, name, max_pixels)


def _read(source: str | os.PathLike[str] | bytes | BinaryIO) -> tuple[bytes, str]:
    """The bytes of a source and what to call it in an error."""
    if isinstance(source, bytes):
        return source, "the given data"
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return file.read(), repr(os.fspath(source))
    data = source.read() if hasattr(source, "read") else None
    if not isinstance(data, bytes):
        raise TypeError(f"source must be a path, bytes or a binary file object, got {type(source).__name__}")
    name = getattr(source, "name", None)
    return data, repr(name) if isinstance(name, str) else f"the given {type(source).__name__}"


def identify(data: bytes) -> Image.Image | None:
    """Return a picture that is not decoded yet, None where no format knows it.

    ``Image.open`` without its own check of the size, which warns once for the process and does not say the size.

    Raises:
        Exception: Of any kind; its header is corrupt.
    """
    for find_formats in (Image.preinit, Image.init):  # the common formats, then all
        find_formats()
        for name in list(Image.ID):
            if name in NOT_DECODED:  # whatever the ending says, bytes of a stranger never start another program
                continue
            factory, accepts = Image.OPEN[name]
            try:
                verdict = accepts is None or accepts(data[:16])
                if verdict and not isinstance(verdict, str):  # a str says which library is missing
                    return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error):
                continue  # how a format says that the file is none of its own
    return None


def _decoded(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    """The picture with its pixels in memory, where it is of a size to go on with."""
    width, height = image.size
    if not width * height:
        raise ImageError(f"{name} is empty: {width} × {height} pixels")
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is too large: {width} × {height} = {width * height} pixels, max_pixels={max_pixels} are allowed"
        )
    try:
        image.load()
    except Exception as error:  # as above
        kind = f"{image.format} of " if image.format else ""
        raise ImageError(f"{name} ({kind}{width} × {height} pixels) is truncated or corrupt: {error}") from error
    return image


# --- transforms -------------------------------------------------------------------------------------------


def ready_to_resize(
    image: Image.Image, max_pixels: int, as_open_clip: bool = False, apply_orientation: bool = False
) -> Image.Image:
    """A picture with its pixels in memory, of 8 bits and turned; arguments and errors as :func:`image_transform`'s."""
    if not isinstance(image, Image.Image):
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise TypeError(
            f"image must be a PIL.Image.Image (clipfast.data.transform.load_image gives one), "
            f"got {type(image).__name__}{shape}"
        )
    image = _decoded(image, "the image", max_pixels)
    turn = _orientation(image) if apply_orientation else None
    if not as_open_clip:
        image = to_8_bits(image)
    return image if turn is None else image.transpose(turn)


_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, kw_only=True)
class OfPictures:
    """What a transform of whichever kind does with pictures; see :func:`image_transform`."""

    train: bool = False
    mean: tuple[float, float, float] = OPENAI_MEAN
    std: tuple[float, float, float] = OPENAI_STD
    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    max_pixels: int = MAX_PIXELS
    as_open_clip: bool = False
    apply_orientation: bool = False


@dataclass(frozen=True)
class ImageTransform(OfPictures):
    """See :func:`image_transform`, which makes it."""

    image_size: tuple[int, int]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> torch.Tensor:
        """The picture as float32 `[3, H, W]`, normalised; errors as :func:`image_transform` says.

        A random crop is drawn from `generator`, or from torch's own.
        """
        image = ready_to_resize(image, self.max_pixels, self.as_open_clip, self.apply_orientation)
        image = self._random_resized_crop(image, generator) if self.train else self._resized(image)
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
        values = pixels.to(torch.float32).div_(255)
        return normalise_(values, self.mean, self.std)

    def blank(self) -> torch.Tensor:
        """A picture of zeros, for the place of one that cannot be read."""
        return torch.zeros(3, *self.image_size, dtype=torch.float32, device="cpu")

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.resize_mode == "squash":
            return image.resize(self.image_size[::-1], _FILTERS[self.interpolation])
        return self._resized_center_crop(image) if self.resize_mode == "shortest" else self._filled_up(image)

    def _filled_up(self, image: Image.Image) -> Image.Image:
        (width, height), (new_height, new_width) = image.size, self.image_size
        shrink = max(height / new_height, width / new_width)
        size = max(1, round(width / shrink)), max(1, round(height / shrink))
        image = image.resize(size, _FILTERS[self.interpolation])
        # in the picture's own mode, as open_clip does: of a palette, the colour of that number
        bands = len(image.getbands())
        colour = (self.fill_color,) * bands if bands > 1 else self.fill_color
        filled = Image.new(image.mode, (new_width, new_height), colour)
        if image.mode == "P":
            filled.putpalette(image.getpalette())
        filled.paste(image, ((new_width - image.width) // 2, (new_height - image.height) // 2))
        return filled

    def _resized_center_crop(self, image: Image.Image) -> Image.Image:
        (width, height), (crop_height, crop_width) = image.size, self.image_size
        if crop_height == crop_width:
            # torchvision's Resize rounds down, open_clip's own for other shapes rounds
            short = min(width, height)
            new_width, new_height = (int(crop_width * side / short) for side in (width, height))
        else:
            shrink = min(height / crop_height, width / crop_width)
            new_width, new_height = round(width / shrink), round(height / shrink)
        if new_width * new_height > self.max_pixels:
            raise ImageError(
                f"the image is too narrow: {width} × {height} pixels become {new_width} × {new_height} before the "
                f"centre is cropped, max_pixels={self.max_pixels} are allowed"
            )
        image = image.resize((new_width, new_height), _FILTERS[self.interpolation])
        left, top = round((new_width - crop_width) / 2), round((new_height - crop_height) / 2)
        return image.crop((left, top, left + crop_width, top + crop_height))

    def _random_resized_crop(self, image: Image.Image, generator: torch.Generator | None) -> Image.Image:
        left, top, width, height = random_part(image.size, self.scale, self.ratio, generator)
        part = image.crop((left, top, left + width, top + height))
        return part.resize(self.image_size[::-1], Image.Resampling.BICUBIC)


@keywords_told
def image_transform(
    image_size: int | tuple[int, int],
    train: bool = False,
    *,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    max_pixels: int = MAX_PIXELS,
    as_open_clip: bool = False,
    apply_orientation: bool = False,
    interpolation: str = "bicubic",
    resize_mode: str = "shortest",
    fill_color: int = 0,
) -> ImageTransform:
    """A callable that turns a PIL picture of any mode into a float32 tensor `[3, H, W]`.

    Gives the numbers of ``open_clip.transform.image_transform(image_size, is_train=train)``; a random crop is
    drawn from torch's generator in torchvision's order, so that one seed gives one crop in both. Grey pictures of
    16 bits are scaled to 8; open_clip cuts them off, so that they come out nearly white.

    Args:
        image_size: height and width of the result in pixels, or both in one int.
        train: a random crop, else the centre.
        mean: of red, green and blue, in [0, 1]; subtracted.
        std: of red, green and blue; divided by.
        scale: bounds of a random crop's share of the picture's area.
        ratio: bounds of a random crop's width / height.
        max_pixels: the largest picture taken, width × height.
        as_open_clip: whether grey pictures of more than 8 bits are cut off at 255, as in open_clip, and not scaled.
        apply_orientation: whether a picture is turned as its EXIF orientation says; open_clip turns none.
        interpolation: ``"bicubic"`` or ``"bilinear"``; a random crop's is bicubic, as in open_clip.
        resize_mode: which side becomes the result's: the ``"shortest"``, and the centre is cropped; the ``"longest"``,
            and what is missing is filled; or both (``"squash"``). A random crop is the same in all.
        fill_color: what fills, from 0 to 255.

    Raises:
        ValueError: an argument out of range. The transform itself raises :class:`ImageError` for a picture that
            is empty, too large, or, where it was opened but not yet read, truncated or corrupt; and `TypeError` for
            what is not a PIL picture.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size):
        raise ValueError(f"image_size must be a positive int or a (height, width) of them, got {image_size!r}")
    check_numbers(mean, std, scale, ratio)
    PreprocessConfig(interpolation=interpolation, resize_mode=resize_mode, fill_color=fill_color)
    return ImageTransform(
        size, interpolation, resize_mode, fill_color, train=train, mean=tuple(mean), std=tuple(std), scale=tuple(scale),
        ratio=tuple(ratio), max_pixels=max_pixels, as_open_clip=as_open_clip, apply_orientation=apply_orientation,
    )  # fmt: skip


def check_numbers(mean: Sequence[float], std: Sequence[float], scale: Sequence[float], ratio: Sequence[float]) -> None:
    """Raise a ValueError unless the arguments of a transform are as many numbers as they should be."""
    for name, value, length in (("mean", mean, 3), ("std", std, 3), ("scale", scale, 2), ("ratio", ratio, 2)):
        if len(value) != length or (name != "mean" and min(value) <= 0):
            raise ValueError(f"{name} must be {length} {'' if name == 'mean' else 'positive '}numbers, got {value!r}")


def to_pixels(
    images: torch.Tensor, mean: Sequence[float] = OPENAI_MEAN, std: Sequence[float] = OPENAI_STD
) -> torch.Tensor:
    """Undo the normalisation of images `[B, 3, H, W]`: uint8 `[B, H, W, 3]`, as pictures are drawn from."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W], got {list(images.shape)}")
    values = images.detach().float() * _per_channel(std, images) + _per_channel(mean, images)
    return (values * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def normalise_(values: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalise a picture's float32 values `[3, H, W]` in place, and return them."""
    return values.sub_(_per_channel(mean, values)).div_(_per_channel(std, values))


def _per_channel(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Three numbers as float32 `[3, 1, 1]`, where `like` is."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(3, 1, 1)


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> Image.Transpose | None:
    """How a picture is turned upright; None where it is, or where nothing readable says so."""
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION))
    except Exception:  # a damaged EXIF block makes Pillow raise anything, and says nothing of the pixels
        return None


def random_part(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: torch.Generator | None = None,
) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part of a picture of `size` (width, height), drawn from `generator`.

    Area and shape are drawn up to ten times until the part fits in the picture; the last resort is the largest
    centred part of an allowed shape. The crop of Inception (Szegedy et al. 2015) as torchvision draws it.
    """
    width, height = size
    log_ratio = torch.tensor(ratio).log().tolist()
    for _ in range(10):
        area = width * height * torch.empty(1).uniform_(*scale, generator=generator).item()
        shape = torch.empty(1).uniform_(*log_ratio, generator=generator).exp().item()
        part_width, part_height = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < part_width <= width and 0 < part_height <= height:
            top = int(torch.randint(height - part_height + 1, (1,), generator=generator))
            left = int(torch.randint(width - part_width + 1, (1,), generator=generator))
            return left, top, part_width, part_height

    part_width, part_height = width, height
    if width / height < min(ratio):
        part_height = round(width / min(ratio))
    elif width / height > max(ratio):
        part_width = round(height * max(ratio))
    return (width - part_width) // 2, (height - part_height) // 2, part_width, part_height
