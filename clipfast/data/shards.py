"""WebDataset shards: tar files whose files of one name make a sample, read by number and written.

Shards are files on this machine or on a filesystem that it mounts. A shard's headers say where everything lies, so a
sample is read without what comes before it: a run goes on at the very sample where it was stopped.

Source of the format: the ``webdataset`` library (Aizman et al., "High Performance I/O For Large Scale Deep Learning",
2019), which writes the shards here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path

import numpy as np

from clipfast.data.cache import cache_folder
from clipfast.data.captions import caption_files, captions_of_json, captions_of_text
from clipfast.data.options import DataOptions, alternatives
from clipfast.data.pairs import Captions, Pair, PairError, Pairs
from clipfast.data.pictures import PICTURES
from clipfast.data.shard_index import LAYOUT, ShardSample, find_part, identity, samples_of, scan_shard
from clipfast.data.shard_writer import write_shards
from clipfast.data.text_files import decode
from clipfast.files import write_atomically

__all__ = ["ShardedPairs", "scan_shard", "shard_names", "write_shards"]


def shard_names(paths: Sequence[Path]) -> list[str]:
    """Name shards from the folder that holds them all: shards of one name in two folders have different ones."""
    places = [Path(os.path.abspath(path)) for path in paths]
    top = os.path.commonpath([place.parent for place in places])
    return [place.relative_to(top).as_posix() for place in places]


class ShardedPairs(Pairs):
    """The pairs in WebDataset shards; see :func:`clipfast.data.sources.open_pairs`.

    Every shard's headers are read once and the number of its samples kept in the cache folder. A shard that is cut
    short is a warning; what is whole of it is used. One that is rewritten meanwhile is read anew.

    Raises:
        ValueError: No shard holds a sample.
    """

    def __init__(self, paths: Sequence[Path], options: DataOptions | None = None) -> None:
        self.paths = self.files = list(paths)
        options = options or DataOptions()
        for path, count in Counter(map(os.path.abspath, self.paths)).items():
            if count > 1:
                warnings.warn(f"data: got {path} {count} times: its samples count as often", stacklevel=3)
        self._names = shard_names(self.paths)
        pictures = alternatives(options.image_key) if options.image_key else [suffix[1:] for suffix in PICTURES]
        self._pictures = [extension.lower() for extension in pictures]
        self._caption_key = options.caption_key
        self._caption_files = caption_files(options.caption_key)
        self._encoding = options.encoding
        self.groups = _count_samples(self.paths)
        self._ends = np.array(list(accumulate(self.groups)))
        if not self._ends[-1]:
            raise ValueError(f"data: got no samples in {len(self.paths)} shards such as {self.paths[0]}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def key(self, index: int) -> str:
        """See :class:`clipfast.data.pairs.PairSource`."""
        shard, sample = self._sample(index)
        return f"{self._names[shard]}/{sample.key}"

    def image(self, index: int) -> bytes:
        """See :class:`clipfast.data.pairs.PairSource`."""
        shard, sample = self._sample(index)
        with self._named(shard, sample), self.paths[shard].open("rb") as file:
            return self._image(file, sample)

    def captions(self, index: int) -> Captions:
        """See :class:`clipfast.data.pairs.PairSource`."""
        shard, sample = self._sample(index)
        with self._named(shard, sample), self.paths[shard].open("rb") as file:
            return self._captions(file, sample)

    def read(self, index: int) -> Pair:
        """See :class:`clipfast.data.pairs.PairSource`."""
        shard, sample = self._sample(index)
        with self._named(shard, sample), self.paths[shard].open("rb") as file:
            image = self._image(file, sample)
            texts, unusable = self._captions(file, sample)
        return Pair(f"{self._names[shard]}/{sample.key}", image, texts[0], texts[1:], unusable)

    def _sample(self, index: int) -> tuple[int, ShardSample]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path = self.paths[shard]
        try:
            samples = samples_of(path)
            if len(samples) != self.groups[shard]:
                raise IndexError(f"got {len(samples)} samples, expected {self.groups[shard]}")
            return shard, samples[index - int(self._ends[shard]) + self.groups[shard]]
        except (OSError, IndexError) as error:
            raise PairError(f"{path}: changed or gone since it was counted: {error}") from error

    @contextlib.contextmanager
    def _named(self, shard: int, sample: ShardSample) -> Iterator[None]:
        """Say which sample an error is about."""
        key = f"{self._names[shard]}/{sample.key}"
        try:
            yield
        except PairError as error:
            raise PairError(f"{key}: {error}") from error
        except (OSError, ValueError) as error:
            raise PairError(f"{key}: {type(error).__name__}: {error}") from error

    def _image(self, file: io.BufferedReader, sample: ShardSample) -> bytes:
        part = find_part(sample, self._pictures)
        if part is None:
            raise PairError(f"got {sample.extensions}, expected a picture ({', '.join(self._pictures[:8])})")
        return _bytes_of(file, part)

    def _captions(self, file: io.BufferedReader, sample: ShardSample) -> Captions:
        files = [name for name in self._caption_files if name != "json"]
        part = find_part(sample, files)
        if part is not None:
            return captions_of_text(decode(_bytes_of(file, part), part[0], self._encoding))
        part = find_part(sample, ["json"])
        if part is None:
            raise PairError(f"got {sample.extensions}, expected a picture and a caption ({', '.join(files)} or json)")
        return captions_of_json(decode(_bytes_of(file, part), "json", self._encoding), self._caption_key)


def _bytes_of(file: io.BufferedReader, part: tuple[str, int, int]) -> bytes:
    extension, first, length = part
    if first < 0:
        raise PairError(f"{extension}: got a link to what the shard lacks, or a sparse file, expected its bytes")
    file.seek(first)
    data = file.read(length)
    if len(data) != length:
        raise PairError(f"{extension}: got {len(data)} bytes, expected {length}")
    return data


def _count_samples(paths: Sequence[Path]) -> list[int]:
    """Return the number of samples of every shard, reading the headers of those that are not in the cache."""
    facts = [LAYOUT, [[str(path.resolve()), *identity(path)] for path in paths]]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    try:
        kept = cache_folder() / f"shards-{name}.json"
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        pass  # not counted yet
    with ThreadPoolExecutor(8) as pool:
        scans = list(pool.map(scan_shard, paths))
    problems = [f"{p}: {problem}" for p, (_, problem) in zip(paths, scans, strict=True) if problem]
    for problem in problems:
        warnings.warn(f"data: a shard is broken, what is whole of it is used: {problem}", stacklevel=4)
    counts = [len(samples) for samples, _ in scans]
    if not problems:
        # where it cannot be kept, it is counted again next time
        with contextlib.suppress(OSError, UnboundLocalError):
            write_atomically(kept, lambda file: file.write(json.dumps(counts).encode()))
    return counts
