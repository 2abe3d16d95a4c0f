"""Small pictures and shards with any members, for tests of what data is read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def png(seed: int, size: int = 8) -> bytes:
    """Return the bytes of a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    """Write a tar file. A text as content is what a symbolic link names; a hard one where it begins with ``=``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type = tarfile.LNKTYPE if data.startswith("=") else tarfile.SYMTYPE
                member.linkname = data.removeprefix("=")
                tar.addfile(member)
            else:
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path
