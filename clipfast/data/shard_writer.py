"""WebDataset shards written: past what cannot be read, and on from where an earlier run was stopped.

A shard holds the pairs of fixed rows of its input. It gets its name when it is whole, and a record of what was left out
is written after it: a run that goes on makes the shards that have no record.

Source of the format: the ``webdataset`` library (Aizman et al., "High Performance I/O For Large Scale Deep Learning",
2019), which writes the shards here.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from clipfast.data.depth import to_8_bits
from clipfast.data.input_facts import difference
from clipfast.data.pairs import Pair, PairError, PairSource
from clipfast.data.pictures import PICTURES
from clipfast.data.read_ahead import read_ahead
from clipfast.data.text_files import without_surrogates
from clipfast.data.transform import ImageError, identify, load_image
from clipfast.files import write_atomically

FORMATS = ("jpg", "png", "webp")
_FORMAT = "clipfast.shards.1"
_MANIFEST, _SKIPPED = "shards.json", "skipped.jsonl"
_OPTIONS: dict[str, dict[str, Any]] = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}}
_STARTS = ((b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"), (b"RIFF", "webp"))
_PILLOWS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass
class WrittenShards:
    """What a run of :func:`make_shards` came to.

    Attributes:
        shards: All shards of the folder, in order.
        pairs: How many pairs they hold.
        made: How many shards this run wrote; the others were there.
        skipped: ``(row, key, reason)`` of the pairs that were left out, of all runs.
        unusable: The same of entries of a pair's list of captions that are none, where others are.
    """

    shards: list[Path] = field(default_factory=list)
    pairs: int = 0
    made: int = 0
    skipped: list[tuple[int, str, str]] = field(default_factory=list)
    unusable: list[tuple[int, str, str]] = field(default_factory=list)


def make_shards(
    source: PairSource,
    folder: str | os.PathLike[str],
    about: dict[str, Any],
    *,
    shard_size: int = 10_000,
    picture_format: str | None = None,
    workers: int = 2,
    on_rows: Callable[[int], None] | None = None,
) -> WrittenShards:
    """Write a source's pairs as WebDataset shards ``00000.tar``, ``00001.tar`` and so on, past what a run left there.

    A pair whose picture cannot be decoded, or without a caption, is left out and listed in ``skipped.jsonl``. A
    sample's key is its row in the source.

    Args:
        source: The pairs.
        folder: Where to; made if it is missing. A folder with other shards is refused.
        about: What JSON can hold of what the shards depend on, such as :func:`clipfast.data.input_facts.input_facts`;
            a run goes on only with the same.
        shard_size: Rows a shard; those that are left out make it smaller.
        picture_format: "jpg" (quality 95), "png" or "webp" (lossless) makes that of pictures of other kinds; None
            stores all as they are.
        workers: Threads that read and decode.
        on_rows: Called with the number of rows each time some are done.

    Raises:
        OSError: The folder cannot be written, or the disk is full.
        ValueError: An argument does not fit, the folder holds other shards or those of another input, or no pair
            could be read.
    """
    folder = Path(folder)
    if shard_size < 1:
        raise ValueError(f"shard_size: got {shard_size}, expected at least 1")
    if picture_format is not None and picture_format not in FORMATS:
        raise ValueError(f"format: got {picture_format!r}, expected one of {', '.join(FORMATS)}")
    settings = {"format": _FORMAT, "pairs": len(source), "shard_size": shard_size, "pictures": picture_format}
    _begin(folder, settings | about)
    done = WrittenShards()
    for number, first in enumerate(range(0, len(source), shard_size)):
        rows = range(first, min(first + shard_size, len(source)))
        shard = folder / f"{number:05d}.tar"
        record = _read_record(shard)
        if record is None:
            record = _make(source, rows, shard, picture_format, workers, on_rows)
            done.made += 1
        elif on_rows is not None:
            on_rows(len(rows))
        done.pairs += record["pairs"]
        done.skipped += map(tuple, record["skipped"])
        done.unusable += map(tuple, record["unusable"])
        if record["pairs"]:
            done.shards.append(shard)
    if not done.pairs:
        # nothing is there to go on with: the input may be mended before the next run
        for path in (folder / _MANIFEST, *(folder / f"{n:05d}.json" for n in range(number + 1))):
            path.unlink(missing_ok=True)
        first = done.skipped[0]
        raise ValueError(
            f"source: got no pair that could be read, expected at least one; the first, {first[1]}: {first[2]}"
        )
    _end(folder, done)
    return done


# --- a folder ---------------------------------------------------------------------------------------------


def _begin(folder: Path, about: dict[str, Any]) -> None:
    """Note what the shards of a folder depend on, or see that it is what it was."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / _MANIFEST
    expected = json.loads(json.dumps(about))
    if not manifest.is_file():
        if any(folder.glob("*.tar")):
            raise ValueError(f"folder: got {folder}, which holds other shards already, expected a folder without")
        write_atomically(manifest, lambda file: file.write(json.dumps(expected).encode()))
        return
    try:
        found = json.loads(manifest.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("format") != _FORMAT:
            raise ValueError("it holds something else")
    except ValueError as error:
        raise ValueError(f"folder: got {manifest}, expected what an earlier run wrote: {error}") from error
    changed = [_change(key, found.get(key), expected.get(key)) for key in expected if found.get(key) != expected[key]]
    if changed:
        raise ValueError(
            f"folder: got {folder} with shards of another run ({'; '.join(changed)}), expected the same, or another "
            f"folder"
        )
    for left in folder.glob("*.part"):
        left.unlink(missing_ok=True)


def _change(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict) and "digest" in before and "digest" in now:
        return f"{name}: {difference(before, now)}"
    return f"{name} was {before!r} and is {now!r}"


def _record_path(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _read_record(shard: Path) -> dict[str, Any] | None:
    """Return what was written of a shard that is finished; None of one that is not."""
    try:
        record = json.loads(_record_path(shard).read_text(encoding="utf-8"))
        whole = record.keys() >= {"skipped", "unusable"}
        whole &= not record["pairs"] or shard.stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _end(folder: Path, done: WrittenShards) -> None:
    skipped = folder / _SKIPPED
    left_out = sorted(done.skipped + done.unusable)
    if not left_out:
        skipped.unlink(missing_ok=True)
        return
    lines = (json.dumps({"row": row, "key": key, "reason": reason}) for row, key, reason in left_out)
    text = "\n".join(lines) + "\n"
    write_atomically(skipped, lambda file: file.write(text.encode()))


# --- a shard ----------------------------------------------------------------------------------------------


def _make(
    source: PairSource,
    rows: range,
    shard: Path,
    picture_format: str | None,
    workers: int,
    on_rows: Callable[[int], None] | None,
) -> dict[str, Any]:
    skipped: list[tuple[int, str, str]] = []
    unusable: list[tuple[int, str, str]] = []

    def read(row: int) -> tuple[Pair, str]:
        pair = source.read(row)
        if not any(caption.strip() for caption in pair.captions):
            raise PairError("its caption is empty")
        image, extension = as_stored(pair.image, picture_format)
        return pair._replace(image=image), extension

    def samples() -> Iterable[dict[str, Any]]:
        for row, found in read_ahead(read, rows, workers=workers, ahead=max(8, 4 * workers)):
            if isinstance(found, Exception):
                skipped.append((row, _key(source, row), f"{type(found).__name__}: {found}"))
            else:
                unusable.extend((row, f"{found[0].key}, {which}", reason) for which, reason in found[0].unusable)
                yield _sample(row, *found)
            if on_rows is not None:
                on_rows(1)

    count = 0

    def save(file: io.BufferedWriter) -> None:
        nonlocal count
        count = _write_tar(samples(), file)

    write_atomically(shard, save)
    record = {"pairs": count, "bytes": shard.stat().st_size, "skipped": skipped, "unusable": unusable}
    if not count:
        shard.unlink()  # a shard without samples is none
    write_atomically(_record_path(shard), lambda file: file.write(json.dumps(record).encode()))
    return record


def _key(source: PairSource, row: int) -> str:
    try:
        return source.key(row)
    except PairError:
        return f"row {row}"


def as_stored(data: bytes, picture_format: str | None = None) -> tuple[bytes, str]:
    """Return a picture's bytes as a shard holds them, and the extension that says what they are.

    Args:
        data: The picture's file. It is decoded, whether it is converted or not: what cannot be read is no sample.
        picture_format: As for :func:`make_shards`.

    Raises:
        ImageError: The picture cannot be read.
        PairError: It cannot be written in that format.
    """
    image = load_image(data)
    extension = _extension(str(image.format))
    if picture_format is None or picture_format == extension:
        return data, extension
    options = dict(_OPTIONS[picture_format])
    if exif := image.info.get("exif"):
        options["exif"] = exif  # the orientation is in it
    image = to_8_bits(image)
    if picture_format == "jpg":
        image = image if image.mode == "L" else image.convert("RGB")
    elif image.mode not in ("1", "L", "LA", "RGB", "RGBA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    file = io.BytesIO()
    try:
        image.save(file, _PILLOWS[picture_format], **options)
    except (OSError, ValueError) as error:
        raise PairError(f"{image.size[0]} × {image.size[1]} pixels cannot be a {picture_format}: {error}") from error
    return file.getvalue(), picture_format


def _extension(kind: str) -> str:
    Image.init()
    kind = "JPEG" if kind == "MPO" else kind  # an MPO begins with a JPEG
    endings = [ending[1:] for ending in PICTURES if Image.EXTENSION.get(ending) == kind]
    return "tga" if "tga" in endings else endings[0]  # a Targa has four, and this is not the first


def _header_extension(pair: Pair) -> str:
    """Return the extension of a picture that is not decoded here: what it begins as, though the rest may be broken."""
    try:
        image = identify(pair.image)
    except Exception:  # a corrupt header can make a decoder raise anything
        image = None
    if image is not None:
        return _extension(str(image.format))
    for start, extension in _STARTS:
        if pair.image.startswith(start):
            return extension
    raise ImageError(f"{pair.key}: got bytes that start with {pair.image[:8]!r}, expected a picture")


def _sample(row: int, pair: Pair, extension: str) -> dict[str, Any]:
    captions = [caption for caption in pair.captions if caption.strip()] or [pair.caption]
    fields = {"key": pair.key, "caption": captions if len(captions) > 1 else captions[0]}
    # a line is a caption: the line ends in one are blanks there, and stay in the .json
    lines = (" ".join(without_surrogates(caption).replace("\r\n", "\n").split("\n")) for caption in captions)
    return {
        "__key__": f"{row:09d}",
        extension: pair.image,
        "txt": "\n".join(lines).encode(),
        "json": json.dumps(fields).encode(),
    }


def _write_tar(samples: Iterable[dict[str, Any]], file: io.BufferedWriter) -> int:
    from webdataset import TarWriter

    count = 0
    with TarWriter(file, encoder=False, mtime=0) as tar:
        for sample in samples:
            tar.write(sample)
            count += 1
    return count


def write_shards(pairs: Iterable[Pair], folder: str | os.PathLike[str], *, shard_size: int = 10_000) -> list[Path]:
    """Write pairs that are at hand as WebDataset shards ``00000.tar``, ``00001.tar`` and so on, at once.

    Args:
        pairs: What to write, in order. Keys are numbered; a pair's own key goes into its ``.json``.
        folder: Where to; made if it is missing, and it may hold no ``.tar`` yet.
        shard_size: Pairs a shard.

    Returns:
        The shards, each written whole before it gets its name.

    Raises:
        ValueError: ``folder`` holds shards, ``shard_size`` is not positive, or bytes do not begin as a picture does.
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
        samples = [_sample(row, pair, _header_extension(pair)) for row, pair in chunk]
        write_atomically(path, partial(_write_tar, samples))
        shards.append(path)
    return shards
