"""Grey pictures of more than 8 bits, scaled to 8 as their depth says.

Pillow makes RGB of them by cutting values off at 255, so that a 16-bit picture is nearly all white; in open_clip too.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE = 258  # TIFF's tag
# formats whose integers Pillow brings to 16 bits
_SCALED_TO_16 = ("PNG", "PPM")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return a deep grey picture in mode ``"L"``; any other as it is.

    Values are rounded, v · 255 / (2^bits − 1), so that a picture whose 8 bits were spread over 16 is the same again.

    Modes of 16 bits (``"I;16"`` and its byte orders) have that depth, or the 12 bits that a TIFF says. Mode ``"I"`` is
    32 signed bits in memory and says nothing of the file: of a PNG or PPM it holds 16; of others the depth is the
    least of 8, 16 and 31 bits that holds the largest value, and 8 bits are left to Pillow.

    Args:
        image: With its pixels in memory.
    """
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    if image.mode != "I":
        tags = getattr(image, "tag_v2", {})
        stored = tags.get(_BITS_PER_SAMPLE, (16,))
        bits = min(16, int(stored[0] if isinstance(stored, tuple) else stored))
    elif image.format in _SCALED_TO_16:
        bits = 16
    else:
        largest = int(values.max(initial=0))
        if largest < 1 << 8:
            return image
        bits = 16 if largest < 1 << 16 else 31
    return Image.fromarray(_scaled(values, bits))


def _scaled(values: np.ndarray, bits: int) -> np.ndarray:
    most = (1 << bits) - 1
    if bits == 31:
        return np.round(values.clip(0, most) * (255 / most)).astype(np.uint8)
    # an entry for every value: no wide copy of the picture is made
    table = ((np.arange(1 << 16).clip(0, most) * 255 + most // 2) // most).astype(np.uint8)
    return table[values if values.dtype.itemsize == 2 else values.clip(0, most)]
