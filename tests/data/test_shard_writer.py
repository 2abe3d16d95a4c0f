from __future__ import annotations

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image, features

from clipfast.data.input_facts import difference, input_facts
from clipfast.data.pairs import Pair
from clipfast.data.shard_writer import as_stored, make_shards, write_shards
from clipfast.data.sources import open_pairs
from clipfast.data.transform import load_image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed: int, kind: str = "PNG", mode: str = "RGB", **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    image = image if mode in ("RGB", "I;16") else image.convert(mode)
    image.save(file, kind, **options)
    return file.getvalue()


def write_folder(folder, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:02d}.png").write_bytes(picture(i))
        (folder / f"{i:02d}.txt").write_text(f"caption {i}")


def make(source, folder, **options):
    return make_shards(open_pairs(source), folder, {"input": input_facts(source)}, **options)


def members(shard) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_bad_pictures_are_left_out_counted_and_named(tmp_path):
    write_folder(tmp_path / "in", 10)
    (tmp_path / "in" / "03.png").write_bytes(picture(3)[:60])
    (tmp_path / "in" / "04.txt").write_text(" \n")
    (tmp_path / "in" / "08.txt").write_bytes(b"caf\xe9")
    rows = []
    done = make(tmp_path / "in", tmp_path / "out", shard_size=4, on_rows=rows.append)
    assert [p.name for p in done.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert (done.pairs, done.made, sum(rows)) == (7, 3, 10)
    assert [row for row, _, _ in done.skipped] == [3, 4, 8]
    for (_, key, reason), words in zip(done.skipped, ("truncated", "caption is empty", "0xe9 at byte 3"), strict=True):
        assert words in reason
        assert key.endswith(".png")
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(e["row"], e["key"], e["reason"]) for e in listed] == done.skipped
    source = open_pairs(tmp_path / "out")
    assert [source.read(i).caption for i in range(len(source))] == [f"caption {i}" for i in (0, 1, 2, 5, 6, 7, 9)]
    assert source.read(3).image == picture(5)
    assert sorted(members(done.shards[0]))[:3] == ["000000000.json", "000000000.png", "000000000.txt"]


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    write_folder(tmp_path / "in", 10)
    (tmp_path / "in" / "01.png").write_bytes(b"bad")
    whole = make(tmp_path / "in", tmp_path / "whole", shard_size=3)
    seen = []

    def stop(rows: int) -> None:
        seen.append(rows)
        if len(seen) == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "in", tmp_path / "out", shard_size=3, on_rows=stop)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tar")) == ["00000.tar", "00001.tar"]
    # killed: what was being written, and a shard whose record was not
    (tmp_path / "out" / "00002.tar.abcd.part").write_bytes(b"half")
    (tmp_path / "out" / "00001.json").unlink()
    again = make(tmp_path / "in", tmp_path / "out", shard_size=3)
    assert again.made == 3
    assert (again.pairs, again.skipped) == (whole.pairs, whole.skipped)
    assert not list((tmp_path / "out").glob("*.part"))
    for one, other in zip(whole.shards, again.shards, strict=True):
        assert one.read_bytes() == other.read_bytes()
    # a finished folder is not made again
    times = [p.stat().st_mtime_ns for p in again.shards]
    assert make(tmp_path / "in", tmp_path / "out", shard_size=3).made == 0
    assert [p.stat().st_mtime_ns for p in again.shards] == times
    # one that was damaged is
    again.shards[2].write_bytes(again.shards[2].read_bytes()[:700])
    assert make(tmp_path / "in", tmp_path / "out", shard_size=3).made == 1
    assert again.shards[2].read_bytes() == whole.shards[2].read_bytes()


def test_another_input_is_refused_by_name(tmp_path):
    write_folder(tmp_path / "in", 5)
    make(tmp_path / "in", tmp_path / "out")
    (tmp_path / "in" / "02.png").write_bytes(picture(99))
    with pytest.raises(ValueError, match=r"shards of another run \(input: .*02.png is changed\), expected the same"):
        make(tmp_path / "in", tmp_path / "out")
    write_folder(tmp_path / "in", 7)
    with pytest.raises(ValueError, match=r"changed, .*05.png and 3 more are new"):
        make(tmp_path / "in", tmp_path / "out")
    write_folder(tmp_path / "other", 5)
    with pytest.raises(ValueError, match=r"new, .*in/00.png and 9 more are gone"):
        make(tmp_path / "other", tmp_path / "out")
    done = make(tmp_path / "other", tmp_path / "out2")
    with pytest.raises(ValueError, match=r"shard_size was 10000 and is 2; pictures was None and is 'jpg'"):
        make(tmp_path / "other", tmp_path / "out2", shard_size=2, picture_format="jpg")
    (tmp_path / "out2" / "shards.json").unlink()
    with pytest.raises(ValueError, match="holds other shards already"):
        make(tmp_path / "other", tmp_path / "out2")
    for text in ("[]", "{", '{"a": 1}'):
        (tmp_path / "out2" / "shards.json").write_text(text)
        with pytest.raises(ValueError, match=r"shards.json, expected what an earlier run wrote"):
            make(tmp_path / "other", tmp_path / "out2")
    assert done.shards[0].is_file()


def test_many_files_are_told_apart_by_a_digest():
    before = {"count": 20_000, "digest": "a"}
    assert difference(before, before) is None
    assert difference(before, before | {"digest": "b"}) == "20000 files, of which some changed"
    assert difference(before, {"count": 3, "digest": "b", "files": {}}) == "3 files and not 20000"


def test_shards_of_shards_and_of_tables(tmp_path):
    write_folder(tmp_path / "in", 5)
    one = make(tmp_path / "in", tmp_path / "one", shard_size=2)
    again = make(tmp_path / "one" / "0000{0..2}.tar", tmp_path / "two")
    assert again.pairs == 5
    (tmp_path / "t.csv").write_text(
        'filepath,title\nin/00.png,"two\nlines"\nin/00.png,\ud83d [b]\n', "utf-8", "surrogatepass"
    )
    with pytest.raises(ValueError, match=r"t.csv: got 0xed at byte"):
        make(tmp_path / "t.csv", tmp_path / "three")
    (tmp_path / "t.csv").write_text('filepath,title\nin/00.png,"two\nlines"\nin/gone.png,x\n')
    done = make(tmp_path / "t.csv", tmp_path / "three")
    # a line of a .txt is a caption: one caption stays one
    found = members(done.shards[0])
    assert found["000000000.txt"] == b"two lines"
    assert json.loads(found["000000000.json"])["caption"] == "two\nlines"
    assert "gone.png" in done.skipped[0][2]
    assert len(one.shards) == 3


def test_captions_with_lone_surrogates_are_written(tmp_path):
    class Source:
        groups = (1,)

        def __len__(self):
            return 1

        def key(self, index):
            return str(index)

        def read(self, index):
            return Pair("caf\udce9.png", picture(0), "a \ud83d cat \ud83d\ude00", ("more",))

    done = make_shards(Source(), tmp_path, {})
    found = members(done.shards[0])
    assert found["000000000.txt"].decode() == "a \ufffd cat \U0001f600\nmore"
    assert json.loads(found["000000000.json"])["key"] == "caf\udce9.png"
    source = open_pairs(tmp_path)
    assert source.read(0).captions == ("a \ufffd cat \U0001f600", "more")


def test_entries_that_are_no_captions_are_counted(tmp_path):
    notes = {"00.json": '{"caption": ["a cat", null, 3]}', "01.json": '{"caption": [null]}', "02.txt": "a dog\n\nmore"}
    (tmp_path / "in").mkdir()
    for name, text in notes.items():
        (tmp_path / "in" / name).write_text(text)
        (tmp_path / "in" / f"{name[:2]}.png").write_bytes(picture(1))
    for _ in range(2):  # a run that finds all there says the same
        done = make(tmp_path / "in", tmp_path / "out")
        assert done.pairs == 2
        assert [row for row, _, _ in done.skipped] == [1]
        assert [(row, key.rpartition("/")[2]) for row, key, _ in done.unusable] == [
            (0, "00.png, caption 2"),
            (0, "00.png, caption 3"),
        ]
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3
    assert members(done.shards[0])["000000002.txt"] == b"a dog\nmore"


def test_shards_below_their_input(tmp_path):
    write_folder(tmp_path / "in", 3)
    out = tmp_path / "in" / "out"
    for made in (1, 0):
        facts = {"input": input_facts(tmp_path / "in", but=out)}
        assert make_shards(open_pairs(tmp_path / "in"), out, facts).made == made


KINDS = [
    ("JPEG", "jpg"),
    ("PNG", "png"),
    ("TIFF", "tif"),
    ("JPEG2000", "jp2"),
    ("PPM", "ppm"),
    ("BMP", "bmp"),
    ("GIF", "gif"),
]
KINDS += [("WEBP", "webp"), ("ICO", "ico"), ("TGA", "tga"), ("PCX", "pcx"), ("MPO", "jpg")]
KINDS += [("AVIF", "avif")] if features.check("avif") else []


@pytest.mark.parametrize(("kind", "extension"), KINDS)
def test_pictures_are_stored_as_they_are_or_converted(kind, extension):
    data = picture(1, kind)
    assert as_stored(data) == (data, extension)
    before = np.asarray(load_image(data).convert("RGB"))
    for wanted in ("png", "webp", "jpg"):
        stored, ending = as_stored(data, wanted)
        assert ending == wanted
        after = load_image(stored)
        assert after.format == {"png": "PNG", "webp": "WEBP", "jpg": "JPEG"}[wanted]
        if wanted == extension:
            assert stored == data
        elif wanted != "jpg":
            assert np.array_equal(np.asarray(after.convert("RGB")), before)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "LAB"])
@pytest.mark.parametrize("wanted", ["jpg", "png", "webp"])
def test_every_mode_is_converted(mode, wanted):
    data = picture(2, "TIFF", mode)
    image = load_image(as_stored(data, wanted)[0])
    if mode == "I;16":
        assert (np.abs(np.asarray(image.convert("L")).astype(int) - (np.asarray(load_image(data)) // 257)) < 40).all()
    assert image.size == (8, 8)


def test_a_conversion_keeps_the_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = picture(1, "JPEG", exif=exif)
    for wanted in ("png", "webp"):
        assert load_image(as_stored(data, wanted)[0]).getexif()[0x0112] == 6


def test_arguments_that_do_not_fit(tmp_path):
    write_folder(tmp_path / "in", 2)
    with pytest.raises(ValueError, match="shard_size: got 0, expected at least 1"):
        make(tmp_path / "in", tmp_path / "out", shard_size=0)
    with pytest.raises(ValueError, match="format: got 'bmp', expected one of jpg, png, webp"):
        make(tmp_path / "in", tmp_path / "out", picture_format="bmp")
    for i in range(2):
        (tmp_path / "in" / f"0{i}.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="got no pair that could be read, .*00.png: .*is not a picture"):
        make(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "in" / "00.png").write_bytes(picture(1))
    assert make(tmp_path / "in", tmp_path / "out").pairs == 1
    (tmp_path / "in" / "00.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match="x: got bytes that start with b'bad', expected a picture"):
        write_shards([Pair("x", b"bad", "c")], tmp_path / "more")


@pytest.mark.skipif(os.name != "posix", reason="links")
def test_a_link_that_leads_nowhere_is_a_fact(tmp_path):
    write_folder(tmp_path / "in", 2)
    (tmp_path / "in" / "09.png").symlink_to("gone.png")
    (tmp_path / "in" / "09.txt").write_text("lost")
    done = make(tmp_path / "in", tmp_path / "out")
    ((row, key, reason),) = done.skipped
    assert (row, key) == (2, str(tmp_path / "in" / "09.png"))
    assert "No such file" in reason
