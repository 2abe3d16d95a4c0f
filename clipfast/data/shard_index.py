"""Where the samples of a WebDataset shard lie, from the headers of its tar file.

Files of one name make a sample, as in the ``webdataset`` library (Aizman et al., "High Performance I/O For Large Scale
Deep Learning", 2019). Unlike there, they need not be neighbours, and a name that comes twice makes two samples or an
error of that sample: never a mixture.
"""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from clipfast.data.pairs import PairError
from clipfast.data.pictures import PICTURES

# shards whose samples' places are kept, in every process that reads
_OPEN_SHARDS = 64
# first byte of a file whose bytes are not in the shard
_NOWHERE = -1
# zeros that writers fill their last record with, and more
_LONGEST_END = 1 << 20
# what tarfile raises for damaged headers; those of long names and large numbers have no checksum
_DAMAGE = (tarfile.TarError, ValueError, OverflowError, IndexError, EOFError, MemoryError)
# raised when the same shard would give other samples
LAYOUT = 2


class ShardSample(NamedTuple):
    """Where one sample lies in its shard.

    Attributes:
        key: The name that its files share; of a name that comes several times, with a number.
        parts: ``(extension, first byte, number of bytes)`` of each file.
        problem: Why it cannot be used, or None.
    """

    key: str
    parts: tuple[tuple[str, int, int], ...]
    problem: str | None = None

    @property
    def extensions(self) -> str:
        """The extensions of its files, for errors."""
        return ", ".join(extension for extension, _, _ in self.parts)


class _Member(NamedTuple):
    number: int
    key: str
    extension: str
    first: int
    length: int


Identity = tuple[int, int, int]


def identity(path: Path) -> Identity:
    """Return what changes when a file is rewritten, even if its size and time are put back.

    Raises:
        OSError: There is no such file.
    """
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def samples_of(path: Path) -> list[ShardSample]:
    """Return a shard's samples, whose headers are read when it is new or was rewritten.

    Raises:
        OSError: The file cannot be read.
    """
    return _samples_of(path, identity(path))


@lru_cache(_OPEN_SHARDS)
def _samples_of(path: Path, _: Identity) -> list[ShardSample]:
    return scan_shard(path)[0]


def scan_shard(path: Path) -> tuple[list[ShardSample], str | None]:
    """Read a shard's headers: its samples, and what is wrong with the rest of it, if anything.

    A shard that was cut short gives the samples that are whole. Links in the shard are followed.

    Raises:
        OSError: The file cannot be read at all.
    """
    found: list[_Member] = []
    files: dict[str, tuple[int, int]] = {}
    links: list[tuple[int, str]] = []  # (place in found, name of what it links to)
    problem = None
    size = path.stat().st_size
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                place = (member.offset_data, member.size)
                if member.issparse():
                    place = (_NOWHERE, 0)
                elif member.isfile():
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    end = max(end, member.offset_data + member.size)
                    files[name] = place
                elif member.issym() or member.islnk():
                    # a hard link names a member that came before, a symbolic one a path from its own folder
                    target = member.linkname.removeprefix("./")
                    if member.issym():
                        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
                    place = files.get(target, (_NOWHERE, 0))
                    if place[0] == _NOWHERE:
                        links.append((len(found), target))
                    else:
                        files[name] = place
                    end = max(end, member.offset_data)
                else:
                    continue
                folder, _, last = name.rpartition("/")
                stem, dot, extension = last.partition(".")
                if dot and stem:
                    key = f"{folder}/{stem}" if folder else stem
                    found.append(_Member(len(found), key, extension.lower(), *place))
            problem = _unread(path, tar.offset, size)
    except _DAMAGE as error:
        problem = f"{error} after {len(found)} files"
    for place, target in links:
        if target in files:
            found[place] = found[place]._replace(first=files[target][0], length=files[target][1])
    samples = _joined(found)
    # a shard that was cut between two files shows no error, but it lacks the zeros that end it
    if not problem and (not found or size < _padded(end) + 512):
        problem = f"it ends without an end mark after {len(found)} files"
    if problem and samples:
        last = next(i for i, sample in enumerate(samples) if _last_file(found) in sample.parts)
        if not _is_whole(samples[last].parts):
            samples.pop(last)
    return samples, problem


def _unread(path: Path, offset: int, size: int) -> str | None:
    """Say what a shard holds behind the place where its end was read: ``tarfile`` takes any damage for the end."""
    with path.open("rb") as file:
        file.seek(offset)
        if not any(file.read(_LONGEST_END)):
            return None
    return f"it is damaged at byte {offset}: the {size - offset} bytes from there on are not read"


def _last_file(found: Sequence[_Member]) -> tuple[str, int, int]:
    return found[-1].extension, found[-1].first, found[-1].length


def _padded(size: int) -> int:
    return -(-size // 512) * 512


def _is_whole(parts: Sequence[tuple[str, int, int]]) -> bool:
    """Whether there is a picture and what goes with it."""
    pictures = sum(f".{extension}" in PICTURES for extension, _, _ in parts)
    return 0 < pictures < len(parts)


def _joined(members: Sequence[_Member]) -> list[ShardSample]:
    """Make samples of files, in the order of their first files."""
    runs: dict[str, list[list[_Member]]] = {}
    previous = None
    for member in members:
        of_key = runs.setdefault(member.key, [])
        if member.key != previous or any(member.extension == other.extension for other in of_key[-1]):
            of_key.append([])
        of_key[-1].append(member)
        previous = member.key
    samples: list[tuple[int, ShardSample]] = []
    keys = set(runs)
    for key, of_key in runs.items():
        for number, (files, problem) in enumerate(_told_apart(of_key), 1):
            name = key
            while number > 1 and name in keys:
                name = f"{key}#{number}"
                number += 1
            keys.add(name)
            parts = tuple((m.extension, m.first, m.length) for m in files)
            samples.append((files[0].number, ShardSample(name, parts, problem)))
    return [sample for _, sample in sorted(samples, key=lambda found: found[0])]


def _told_apart(runs: list[list[_Member]]) -> list[tuple[list[_Member], str | None]]:
    """Say which runs of neighbours of one key are samples: all of them, or one in pieces, or nobody can tell."""
    if len(runs) == 1:
        return [(runs[0], None)]
    kinds = [sorted(member.extension for member in run) for run in runs]
    flat = [extension for kind in kinds for extension in kind]
    joined = [member for run in runs for member in run]
    if len(set(flat)) == len(flat):
        return [(joined, None)]
    whole = [_is_whole([(m.extension, m.first, m.length) for m in run]) for run in runs]
    if all(whole) or all(kind == kinds[0] for kind in kinds):
        return [(run, None) for run in runs]
    pieces = " | ".join(", ".join(kind) for kind in kinds[:4])
    return [(joined, f"its name comes {len(runs)} times, with {pieces}: nobody can tell which belong together")]


def find_part(sample: ShardSample, wanted: Sequence[str]) -> tuple[str, int, int] | None:
    """Return the file of the first extension that a sample has; None if it has none of them.

    A name with more dots (``cat.small.jpg`` is the file ``small.jpg`` of ``cat``) counts by its last extension where
    no other does.

    Raises:
        PairError: Several files end alike.
    """
    if sample.problem:
        raise PairError(sample.problem)
    for name in wanted:
        for part in sample.parts:
            if part[0] == name:
                return part
    endings = tuple(f".{name}" for name in wanted)
    longer = [part for part in sample.parts if part[0].endswith(endings)]
    if len(longer) > 1:
        raise PairError(f"got {sample.extensions}, expected one of them: a sample's name ends at its first dot")
    return longer[0] if longer else None
