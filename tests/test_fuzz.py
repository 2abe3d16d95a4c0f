"""Files that are damaged at random, through every command that reads data: no traceback, no hang, no silent loss."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import tarfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import small
from PIL import features
from typer.testing import CliRunner

from clipfast.cli import app

COUNT = 8
SECONDS = 30  # a command that takes longer hangs
PICTURES = ["png", "jpg", "gif", "webp", "bmp", "tif", "jp2", "ppm", *(["avif"] if features.check("avif") else [])]
PLACES = ["folder", "tar", "csv", "tsv", "parquet", "labels", "classes", "coco", "list"]


def write_place(folder: Path, place: str, rng: np.random.Generator) -> tuple[str, list[Path]]:
    """Write pairs of one kind; return what a command is given, and the files that may be damaged."""
    folder.mkdir()
    kinds = [PICTURES[int(rng.integers(len(PICTURES)))] for _ in range(COUNT)]
    stored = []
    for i, kind in enumerate(kinds):
        file = io.BytesIO()
        name = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}.get(kind, kind.upper())
        small.picture(i, (24, 20)).save(file, name)
        stored.append((f"{i:02d}.{kind}", file.getvalue(), f'caption {i}, "née" 猫'))
    if place not in ("tar", "classes", "parquet"):
        for i, (name, data, caption) in enumerate(stored):
            path = folder / (f"class_{i % 2}" if place == "labels" else "") / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            if place == "folder":
                path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    pictures = [folder / name for name, _, _ in stored]
    if place in ("csv", "tsv"):
        table = folder / f"pairs.{place}"
        with table.open("w", newline="", encoding="utf-8") as file:
            if place == "csv":
                csv.writer(file).writerows([("filepath", "title"), *((name, caption) for name, _, caption in stored)])
            else:
                file.write(
                    "".join(f"{name}\t{caption}\n" for name, _, caption in [("filepath", b"", "title"), *stored])
                )
        return str(table), [table] * 6 + pictures
    if place == "coco":
        images = [{"id": i, "file_name": name} for i, (name, _, _) in enumerate(stored)]
        notes = [{"image_id": i, "caption": caption} for i, (_, _, caption) in enumerate(stored)]
        place_of_notes = folder / "captions_val.json"
        place_of_notes.write_text(json.dumps({"images": images, "annotations": notes}))
        return str(place_of_notes), [place_of_notes] * 4 + pictures
    if place == "list":
        (folder / "list.txt").write_text("\n".join(name for name, _, _ in stored) + "\n")
        return str(folder / "list.txt"), [folder / "list.txt"] * 2 + pictures
    if place in ("tar", "classes"):
        if place == "classes":
            (folder / "classnames.txt").write_text("a cat\na dog\n")
        for half in range(2):
            with tarfile.open(folder / f"{half}.tar", "w") as tar:
                for name, data, caption in stored[half::2]:
                    beside = (".cls", b"1") if place == "classes" else (".txt", caption.encode())
                    for member, content in ((name, data), (name[:2] + beside[0], beside[1])):
                        info = tarfile.TarInfo(member)
                        info.size = len(content)
                        if half:  # headers without a checksum
                            info.pax_headers = {"comment": "née", "mtime": "1.5", "path": member}
                        tar.addfile(info, io.BytesIO(content))
        return str(folder), sorted(folder.glob("*.tar"))
    if place == "parquet":
        columns = {"image": [data for _, data, _ in stored], "caption": [caption for _, _, caption in stored]}
        table = pyarrow.table(columns)
        parquet.write_table(table, folder / "p.parquet", row_group_size=3)
        return str(folder / "p.parquet"), [folder / "p.parquet"]
    return str(folder), sorted(path for path in folder.rglob("*") if path.is_file())


def damage(path: Path, rng: np.random.Generator) -> str:
    """Do one random thing to a file, and say what."""
    data = bytearray(path.read_bytes())
    size = len(data)
    where = int(rng.integers(max(1, size)))
    if rng.random() < 0.3:
        where = int(rng.integers(min(size, 64) or 1))  # headers
    length = int(rng.integers(1, max(2, size // 3)))
    kind = int(rng.integers(9))
    if kind == 2 and not any(data[where + length :]):
        kind = 3  # a shard that goes on with zeros alone has ended
    if kind == 0:
        del data[where:]
    elif kind == 1:
        for place in rng.integers(0, size, int(rng.integers(1, 9))):
            data[int(place)] ^= 1 << int(rng.integers(8))
    elif kind == 2:
        data[where : where + length] = bytes(len(data[where : where + length]))
    elif kind == 3:
        data[where : where + length] = rng.bytes(len(data[where : where + length]))
    elif kind == 4:
        del data[where : where + length]
    elif kind == 5:
        data[where:where] = rng.bytes(length)
    elif kind == 6:
        data[where:where] = data[:length]
    elif kind == 7:
        signs = [b'"', b"\n", b"\r", b"\t", b",", b"\0", b"\xff", "\u2028".encode(), b"'", b"[/]", b"\xed\xa0\xbd"]
        for _ in range(3):
            data[where:where] = signs[int(rng.integers(len(signs)))]
    else:
        data = bytearray([b"", b"no such kind", b"<html>", bytes(700)][int(rng.integers(4))])
    path.write_bytes(data)
    words = ("cut", "bits flipped", "zeros", "noise", "a part gone", "noise put in", "repeated", "signs", "replaced")
    return f"{path.name}: {words[kind]} at {where}"


def samples_left(shard: Path) -> int:
    """Count the samples of a shard: those that it lists if it ends as it should, and otherwise those it was given."""
    keys = set()
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                keys.add(member.name.partition(".")[0])
            end = tar.offset
    except (tarfile.TarError, ValueError):
        return COUNT // 2
    data = shard.read_bytes()
    return len(keys) if len(data) >= end + 512 and not any(data[end:]) else COUNT // 2


def pairs_left(source: str, place: str) -> int:
    """Count the pairs that a place promises: those that a table was cut down to are not missed by anybody."""
    if place == "tsv":
        return sum(bool(line.removesuffix(b"\r")) for line in Path(source).read_bytes().split(b"\n")) - 1
    if place == "list":
        lines = Path(source).read_bytes().split(b"\n")
        return len(lines) - (not lines[-1])
    if place in ("tar", "classes"):
        return sum(map(samples_left, sorted(Path(source).glob("*.tar"))))
    if place == "coco":
        try:
            held = json.loads(Path(source).read_bytes())
        except ValueError:
            return 0  # it is refused
        named = {note["image_id"] for note in held["annotations"]}
        return sum(image["id"] in named for image in held["images"])
    if place == "csv":
        text = Path(source).read_bytes().decode("utf-8", "replace")
        return sum(map(bool, csv.reader(io.StringIO(text, newline="")))) - 1
    return COUNT


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"{what} hangs:\n{''.join(traceback.format_stack(limit=8))}")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run(what: str, names: list[str], *arguments: object) -> tuple[int, str, str]:
    """Run a command in this process: it ends well, or with a line that says what is wrong with which of the files."""
    with time_limit(what):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    trace = "".join(traceback.format_exception(*done.exc_info)) if done.exc_info else ""
    assert done.exception is None or isinstance(done.exception, SystemExit), f"{what}\n{trace}"
    assert "Traceback" not in done.stderr, f"{what}\n{done.stderr}"
    if done.exit_code:
        assert not what.endswith(", whole"), f"{what}\n{done.output}"
        assert done.exit_code in (1, 2), what
        error = re.search(r"^error: .*", done.stderr, re.MULTILINE)
        assert error, f"{what}\n{done.output}"
        # with fewer pairs than a batch, or than can be compared, nothing is wrong with any one
        too_few = "batch_size: got 4" in error[0] or "val_data: got 1 pairs" in error[0]
        assert too_few or any(name in error[0] for name in names), f"{what}\n{done.output}"
    return done.exit_code, done.stdout, done.stderr


def accounted(what: str, kept: int, skipped: int, said: str, expected: int) -> None:
    """Check that what is missing was counted, or that the file it was lost with was named."""
    told = re.search(r"broken|left out|lines? \d", said)
    assert not (what.endswith(", whole") and (skipped or told)), f"{what}\n{said}"
    assert kept + skipped == expected or told, f"{what}: {kept} kept, {skipped} skipped of {expected}\n{said}"


def skipped_in(said: str) -> int:
    found = re.search(r"skipped (\d+) ", said)
    return int(found[1]) if found else 0


def try_damage(seed: int, model: Path, folder: Path, times: int | None = None, train: bool = True) -> None:
    """Write pairs, damage their files, and put them through every command; ``times`` 0 wants success."""
    rng = np.random.default_rng(seed)
    place = PLACES[seed % len(PLACES)]
    source, files = write_place(folder / "in", place, rng)
    count = int(rng.integers(1, 4)) if times is None else times
    done = [damage(files[int(rng.integers(len(files)))], rng) for _ in range(count)]
    what = f"seed {seed}, {place}, {', '.join(done) or 'whole'}"

    expected = pairs_left(source, place)
    names = [source, f"{folder / 'in'}/", *(path.name for path in files)]
    kind = "image" if place in ("labels", "classes") or rng.random() < 0.6 else "text"
    out = folder / ("f.npy" if rng.random() < 0.5 else "f.parquet")
    code, printed, said = run(
        f"embed {kind}, {what}", names, "embed", model, source, out, "--kind", kind, "--workers", 2
    )
    if not code:
        rows = int(re.search(r": (\d+) rows", printed)[1])
        # a caption that a line end was put in is two
        if kind == "image" or place in ("csv", "tsv", "parquet", "list"):
            accounted(f"embed {kind}, {what}", rows, skipped_in(said), said, expected)
        listed = out.with_name(out.name + ".skipped.jsonl")
        named = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
        assert len(named) == skipped_in(said), what
        assert all(entry["name"] and entry["reason"] for entry in named), what

    if place == "list":
        return
    code, printed, said = run(f"eval, {what}", names, "eval", model, "--data", source, "--json", "--batch-size", 4)
    if not code:
        result = json.loads(printed)
        # rows of a table may name one picture
        kept = result["counts"]["texts" if place in ("csv", "tsv") else "pictures"]
        accounted(f"eval, {what}", kept, len(result["skipped"]), said, expected)

    if place in ("labels", "classes"):
        return
    code, printed, said = run(f"shards, {what}", names, "shards", source, folder / "out", "--shard-size", 3)
    if not code:
        pairs = int(re.search(r"(\d+) pairs", printed)[1])
        accounted(f"shards, {what}", pairs, skipped_in(said), said, expected)
        again = run(f"shards again, {what}", names, "shards", source, folder / "out", "--shard-size", 3)
        assert "is complete" in again[1], what
    if not train:
        return

    settings = {"data": source, "model": model / "model.json", "output": folder / "run", "steps": 2, "batch-size": 4}
    settings |= {"workers": 0, "device": "cpu", "val-data": source, "val-every": 1}
    flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
    code, printed, said = run(f"train, {what}", names, "train", *flags, "--no-tensorboard")
    if not code:
        logs = list((folder / "run").glob("skipped-*.jsonl"))
        named = [json.loads(line) for path in logs for line in path.read_text().splitlines()]
        assert skipped_in(printed + said) == len(named), what


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    small.run(tmp_path / "model")
    return tmp_path


def try_many(place: Path, seeds: range, trained: int = 1) -> None:
    """Try each seed; every ``trained``-th is trained on, too."""
    for seed in seeds:
        folder = place / str(seed)
        folder.mkdir()
        try_damage(seed, place / "model", folder, train=seed // len(PLACES) % trained == 0)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", PLACES)
def test_whole_files(place, kind):
    """What is damaged below works when it is whole, and nothing is skipped."""
    try_damage(PLACES.index(kind), place / "model", place, times=0, train=kind == "parquet")


def test_damaged_files(place):
    try_many(place, range(18), trained=9)


@pytest.mark.exhaustive
def test_many_damaged_files(place):
    try_many(place, range(500))
