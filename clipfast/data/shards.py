"""WebDataset shards: tar files whose neighbours of one name make a sample, read by number and written.

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
import tarfile
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipfast.data.cache import cache_folder
from clipfast.data.sources import PICTURES, Pair, PairError
from clipfast.files import write_atomically

# shards whose samples' places are kept, in every process that reads
_OPEN_SHARDS = 64


class ShardSample(NamedTuple):
    """Where one sample lies in its shard.

    Attributes:
        key: The name that its files share.
        parts: ``(extension, first byte, number of bytes)`` of each file.
    """

    key: str
    parts: tuple[tuple[str, int, int], ...]


def expand_shards(pattern: str) -> list[Path]:
    """List the shards of ``a-{000..099}.tar``, or of several such patterns joined by ``::``.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard is somewhere else than in a file.
    """
    import braceexpand

    names = [name for part in pattern.split("::") for name in braceexpand.braceexpand(part)]
    remote = [name for name in names if "://" in name or name.startswith("pipe:")]
    if remote:
        raise ValueError(f"data: got {remote[0]}, expected files: mount the store, or copy the shards first")
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"data: {len(missing)} of {len(names)} shards are missing, the first is {missing[0]}: correct the pattern"
        )
    return [Path(name) for name in names]


def scan_shard(path: Path) -> tuple[list[ShardSample], str | None]:
    """Read a shard's headers: its samples, and what is wrong with the rest of it, if anything.

    A shard that was cut short gives the samples that are whole.

    Raises:
        OSError: The file cannot be read at all.
    """
    found: list[tuple[str, str, int, int]] = []
    problem = None
    size = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not member.isfile() or not dot or not stem:
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError("unexpected end of data")
                key = f"{folder}/{stem}" if folder else stem
                found.append((key, extension.lower(), member.offset_data, member.size))
    except tarfile.TarError as error:
        problem = f"{error} after {len(found)} files"
        if found and found[-1][2] + found[-1][3] > size:
            found.pop()
    samples = [
        ShardSample(key, tuple((extension, first, length) for _, extension, first, length in files))
        for key, files in groupby(found, key=lambda file: file[0])
    ]
    # a shard that was cut between two files shows no error, but it lacks the zeros that end it
    if not problem and (not found or size < _padded(found[-1][2] + found[-1][3]) + 512):
        problem = f"it ends without an end mark after {len(found)} files"
    if problem and samples and not _is_whole(samples[-1]):
        samples.pop()
    return samples, problem


def _padded(size: int) -> int:
    return -(-size // 512) * 512


def _is_whole(sample: ShardSample) -> bool:
    extensions = {extension for extension, _, _ in sample.parts}
    return bool(extensions & {"txt", "json"}) and any(f".{extension}" in PICTURES for extension in extensions)


@lru_cache(_OPEN_SHARDS)
def _samples_of(path: Path) -> list[ShardSample]:
    return scan_shard(path)[0]


class ShardedPairs:
    """The pairs in WebDataset shards; see :func:`clipfast.data.sources.open_pairs`.

    Every shard's headers are read once and the number of its samples kept in the cache folder. A shard that is cut
    short is a warning; what is whole of it is used.

    Raises:
        ValueError: No shard holds a sample.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.groups = _count_samples(self.paths)
        self._ends = np.array(list(accumulate(self.groups)))
        if not self._ends[-1]:
            raise ValueError(f"data: got no samples in {len(self.paths)} shards such as {self.paths[0]}")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Pair:
        """See :class:`clipfast.data.sources.PairSource`."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        path = self.paths[shard]
        try:
            sample = _samples_of(path)[index - int(self._ends[shard]) + self.groups[shard]]
        except (OSError, IndexError) as error:
            raise PairError(f"{path}: changed or gone since it was counted: {error}") from error
        key = f"{path.name}/{sample.key}"
        try:
            with path.open("rb") as file:
                image = _part(file, sample, [suffix[1:] for suffix in PICTURES])
                text, fields = _part(file, sample, ["txt"]), None
                if text is None:
                    fields = _part(file, sample, ["json"])
            if image is None or (text is None and fields is None):
                raise PairError(f"{key}: got {', '.join(e for e, _, _ in sample.parts)}, expected a picture and a .txt")
            caption = text.decode() if text is not None else json.loads(fields)["caption"]
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise PairError(f"{key}: {type(error).__name__}: {error}") from error
        return Pair(key, image, caption)


def _part(file: io.BufferedReader, sample: ShardSample, extensions: Iterable[str]) -> bytes | None:
    for wanted in extensions:
        for extension, first, length in sample.parts:
            if extension == wanted:
                file.seek(first)
                data = file.read(length)
                if len(data) != length:
                    raise PairError(f"{sample.key}.{extension}: got {len(data)} bytes, expected {length}")
                return data
    return None


def _count_samples(paths: Sequence[Path]) -> list[int]:
    """Return the number of samples of every shard, reading the headers of those that are not in the cache."""
    stats = [path.stat() for path in paths]
    facts = [[str(p.resolve()), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats, strict=True)]
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


def write_shards(pairs: Iterable[Pair], folder: str | os.PathLike[str], *, shard_size: int = 10_000) -> list[Path]:
    """Write pairs as WebDataset shards ``00000.tar``, ``00001.tar`` and so on.

    Args:
        pairs: What to write, in order. Keys are numbered; a pair's own key goes into its ``.json``.
        folder: Where to; made if it is missing, and it may hold no ``.tar`` yet.
        shard_size: Pairs a shard.

    Returns:
        The shards, each written whole before it gets its name.

    Raises:
        ValueError: ``folder`` holds shards, ``shard_size`` is not positive, or a pair's picture is of no known kind.
    """
    folder = Path(folder)
    if shard_size < 1:
        raise ValueError(f"shard_size: got {shard_size}, expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise ValueError(f"folder: got {folder}, which holds shards already, expected a folder without")
    shards: list[Path] = []
    numbered = enumerate(pairs)
    while chunk := list(islice(numbered, shard_size)):
        path = folder / f"{len(shards):05d}.tar"
        write_atomically(path, partial(_write_shard, chunk))
        shards.append(path)
    return shards


def _write_shard(chunk: list[tuple[int, Pair]], file: io.BufferedWriter) -> None:
    from webdataset import TarWriter

    with TarWriter(file, encoder=False, mtime=0) as tar:
        for index, pair in chunk:
            fields = json.dumps({"key": pair.key, "caption": pair.caption}).encode()
            sample = {_kind(pair): pair.image, "txt": pair.caption.encode(), "json": fields}
            tar.write({"__key__": f"{index:09d}"} | sample)


def _kind(pair: Pair) -> str:
    for magic, kind in ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp")):
        if pair.image.startswith(magic):
            return kind
    if pair.image[:4] == b"RIFF" and pair.image[8:12] == b"WEBP":
        return "webp"
    raise ValueError(
        f"{pair.key}: got bytes that start with {pair.image[:8]!r}, expected a JPEG, PNG, WebP, GIF or BMP"
    )
