"""Picture-caption pairs that packages bring: named where others are paths, so that nothing has to be made first."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from clipfast.data.emoji_pairs import DrawnEmoji, load_emoji_pairs
from clipfast.data.pairs import Captions, PairError, Pairs
from clipfast.extras import missing

# the most pixels that emoji are drawn at: all that training sees are in memory at once
_MOST_PIXELS = 224

#: What a place of pairs may be called; a file or folder of that name goes before.
SHIPPED = ("emoji", "scikit-image")


def is_shipped(path: str | os.PathLike[str]) -> bool:
    """Whether a place is the name of pairs that a package brings, and of no file or folder here."""
    return os.fspath(path) in SHIPPED and not os.path.exists(path)


def open_shipped(name: str, *, training: bool = False, image_size: int | tuple[int, int] | None = None) -> Pairs:
    """Return the pairs of a name.

    Args:
        name: One of

            - ``"emoji"``: those of ``clipfast demo``, drawn once and kept in the cache folder; see
              :func:`clipfast.data.emoji_pairs.load_emoji_pairs`. Those that are held out, or those to train on;
            - ``"scikit-image"``: eight pictures of that library, with the captions of OpenAI's notebook.
        training: Which side of the emoji.
        image_size: Of the model: emoji are drawn so large, up to 224 pixels a side; 64 by default.

    Raises:
        ImportError: A package is missing.
    """
    if name == "emoji":
        side = 64 if image_size is None else max(image_size) if isinstance(image_size, tuple) else image_size
        pairs = load_emoji_pairs(min(max(side, 8), _MOST_PIXELS))
        return DrawnEmoji(pairs, pairs.train_indices if training else pairs.held_out_indices)
    return ScikitImagePairs()


class ScikitImagePairs(Pairs):
    """The eight pictures of scikit-image that OpenAI's notebook captions, and their captions.

    The library is looked for and not imported.

    Raises:
        ImportError: scikit-image is missing.

    Source: ``notebooks/Interacting_with_CLIP.ipynb`` of OpenAI's CLIP.
    """

    groups = (8,)
    identity = "scikit-image"
    _CAPTIONS = (
        ("page.png", "a page of text about segmentation"),
        ("chelsea.png", "a facial photo of a tabby cat"),
        ("astronaut.png", "a portrait of an astronaut with the American flag"),
        ("rocket.jpg", "a rocket standing on a launchpad"),
        ("motorcycle_right.png", "a red motorcycle standing in a garage"),
        ("camera.png", "a person looking at a camera on a tripod"),
        ("horse.png", "a black-and-white silhouette of a horse"),
        ("coffee.png", "a cup of coffee on a saucer"),
    )

    def __init__(self) -> None:
        spec = importlib.util.find_spec("skimage")
        if spec is None or not spec.submodule_search_locations:
            raise missing("data: 'scikit-image' needs", "skimage")
        self._folder = Path(next(iter(spec.submodule_search_locations))) / "data"

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return self._CAPTIONS[index][0]

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        try:
            return (self._folder / self.key(index)).read_bytes()
        except OSError as error:
            raise PairError(f"{self.key(index)}: {error}") from error

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        return Captions((self._CAPTIONS[index][1],))
