"""What a sample is: a picture and the captions of it, at a place of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol


class PairError(ValueError):
    """A pair that cannot be read: its picture or its caption is missing or broken. The others can."""


class Captions(NamedTuple):
    """The captions of one picture.

    Attributes:
        texts: One or more; a blank text stands for an empty file or field.
        unusable: Which other entries of a list are no captions, and why: ``("caption 2", "got null …")``.
    """

    texts: tuple[str, ...]
    unusable: tuple[tuple[str, str], ...] = ()


class Pair(NamedTuple):
    """One picture and its caption, as they are stored.

    Attributes:
        key: Where the pair lies: a path, or ``shard.tar/key``. No other picture of the source has this key.
        image: The bytes of the picture's file.
        caption: Its text, or the first of several.
        others: The other captions of this picture.
        unusable: Which entries of its list of captions are none, and why.
    """

    key: str
    image: bytes
    caption: str
    others: tuple[str, ...] = ()
    unusable: tuple[tuple[str, str], ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions of this picture, in their order."""
        return (self.caption, *self.others)


class PairSource(Protocol):
    """N pairs, read by number.

    Attributes:
        groups: How many pairs lie together, in order: those of each shard, or all of them where none are closer than
            others.
        together: The most pairs that are to be shuffled together, or None: what must be in memory to read them is
            large.
        files: The files that say which pairs there are, and where; none for a folder's.
        repeats: Whether several pairs may be of one picture.
        identity: What tells these pairs from others that no files say; empty for those that files do.
    """

    groups: Sequence[int]
    together: int | None
    files: Sequence[Path]
    repeats: bool
    identity: str

    def __len__(self) -> int:
        """Return N."""
        ...

    def key(self, index: int) -> str:
        """Return where picture ``index`` lies. Pairs of one key have one picture; different pictures have different
        keys, also where shards or members of them share a name."""
        ...

    def image(self, index: int) -> bytes:
        """Read the picture's file.

        Raises:
            PairError: It cannot be read.
        """
        ...

    def captions(self, index: int) -> Captions:
        """Read the captions.

        Raises:
            PairError: They cannot be read, or none is a text.
        """
        ...

    def read(self, index: int) -> Pair:
        """Read pair ``index``, 0 to N − 1.

        Raises:
            PairError: This pair cannot be read.
        """
        ...


class Pairs:
    """What sources share: a pair is its key, its picture and its captions."""

    groups: Sequence[int]
    together: int | None = None
    files: Sequence[Path] = ()
    repeats: bool = False
    identity: str = ""

    def __len__(self) -> int:
        return sum(self.groups)

    def key(self, index: int) -> str:
        """See :class:`PairSource`."""
        raise NotImplementedError

    def image(self, index: int) -> bytes:
        """See :class:`PairSource`."""
        raise NotImplementedError

    def captions(self, index: int) -> Captions:
        """See :class:`PairSource`."""
        raise NotImplementedError

    def read(self, index: int) -> Pair:
        """See :class:`PairSource`."""
        image = self.image(index)
        texts, unusable = self.captions(index)
        return Pair(self.key(index), image, texts[0], texts[1:], unusable)


class DistinctPictures(Pairs):
    """The first pair of every picture among the first of a source: what measures that know one caption a picture take.

    Args:
        source: The pairs.
        count: How many of them are looked at.
    """

    def __init__(self, source: PairSource, count: int) -> None:
        self._source = source
        first: dict[str, int] = {}
        for index in range(min(count, len(source))):
            try:
                first.setdefault(source.key(index) if source.repeats else str(index), index)
            except PairError:
                first[f"pair {index}"] = index  # reading it says why
        self._indices = list(first.values())
        self.groups = (len(self._indices),)
        self.together = source.together

    def key(self, index: int) -> str:
        """See :class:`PairSource`."""
        return self._source.key(self._indices[index])

    def image(self, index: int) -> bytes:
        """See :class:`PairSource`."""
        return self._source.image(self._indices[index])

    def captions(self, index: int) -> Captions:
        """See :class:`PairSource`."""
        return self._source.captions(self._indices[index])

    def read(self, index: int) -> Pair:
        """See :class:`PairSource`."""
        # not part by part: a shard is opened once
        return self._source.read(self._indices[index])
