"""Which files are pictures: the endings of what Pillow reads here, one list for every room."""

from __future__ import annotations

import os

from PIL import Image

# the usual ones first, so that they are looked for first, and named first
_USUAL = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif", ".jp2", ".ppm")
# Pillow tells these by their headers and has no decoder of its own for them; PostScript would start Ghostscript
NOT_DECODED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")


def _endings() -> tuple[str, ...]:
    Image.init()
    # an MPO is opened as the JPEG that it begins with
    readable = {ending for ending, kind in Image.EXTENSION.items() if kind in Image.OPEN or kind == "MPO"}
    readable -= {ending for ending, kind in Image.EXTENSION.items() if kind in NOT_DECODED}
    return (*(ending for ending in _USUAL if ending in readable), *sorted(readable - set(_USUAL)))


# The endings of pictures, lower case, with their dots. Plugins that are imported before this module count too.
PICTURES = _endings()
_PICTURES = frozenset(PICTURES)


def ending_of(name: str | os.PathLike[str]) -> str:
    """Return the last ending of a file's name in lower case, ``".jpg"``; ``""`` where it has none."""
    return os.path.splitext(os.fspath(name))[1].lower()


def is_picture(name: str | os.PathLike[str]) -> bool:
    """Whether a file's name ends as those of pictures do."""
    return ending_of(name) in _PICTURES
