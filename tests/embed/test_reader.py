from __future__ import annotations

import csv
import os
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest
import small

from clipfast.data.options import DataOptions
from clipfast.data.shards import write_shards
from clipfast.data.sources import PairError, open_pairs
from clipfast.embed.reader import open_inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    small.write_pictures(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "below").mkdir()
    small.picture(9).save(tmp_path / "pictures" / "below" / "z.jpg")
    return tmp_path / "pictures"


def contents(inputs) -> list[tuple[str, bytes | str]]:
    found = []
    for row in range(len(inputs)):
        content = inputs.read(row)
        found.append((inputs.name(row), content))
    return found


def test_a_folder(folder):
    images = contents(open_inputs(folder))
    assert [name for name, _ in images] == ["00.png", "01.png", "02.png", "03.png", "below/z.jpg"]
    assert images[4][1] == (folder / "below" / "z.jpg").read_bytes()
    texts = contents(open_inputs(folder, "text"))
    assert texts[1] == ("01.txt", "a green thing, number 1")


def test_lists(folder):
    (folder / "list.txt").write_text("below/z.jpg\n\n00.png\nmissing.png\n", encoding="utf-8-sig")
    inputs = open_inputs(folder / "list.txt")
    assert len(inputs) == 4
    assert inputs.name(0) == "below/z.jpg"
    # row i is line i + 1: a blank line is no picture, and moves no other
    assert inputs.name(1) == "line 2"
    with pytest.raises(PairError, match="it is blank"):
        inputs.read(1)
    assert inputs.read(2) == (folder / "00.png").read_bytes()
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        inputs.read(3)
    texts = open_inputs(folder / "list.txt", "text")
    assert [texts.read(row) for row in (0, 2, 3)] == ["below/z.jpg", "00.png", "missing.png"]
    with pytest.raises(PairError, match="it is blank"):
        texts.read(1)


@pytest.mark.parametrize("sign", ["\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x85", "\r"])
def test_a_line_ends_with_a_line_feed_alone(folder, sign):
    (folder / "list.txt").write_bytes(f'a{sign}b\r\n"quoted\n[bold]c\n'.encode())
    expected = [f"a{sign}b", '"quoted', "[bold]c"]
    assert [text for _, text in contents(open_inputs(folder / "list.txt", "text"))] == expected


def test_lists_in_other_encodings(folder):
    place = folder / "list.txt"
    place.write_bytes("café\nnaïve\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list.txt: got 0xe9 at byte 3, expected UTF-8: give --encoding"):
        open_inputs(place, "text")
    with pytest.raises(ValueError, match=r"list.txt: got 0xe9 at byte 3"):
        open_inputs(place)
    latin = DataOptions(encoding="latin-1")
    assert [text for _, text in contents(open_inputs(place, "text", options=latin))] == ["café", "naïve"]
    place.write_text("café", encoding="utf-16")
    with pytest.raises(ValueError, match=r"byte order mark of utf-16 at byte 0"):
        open_inputs(place, "text")
    (folder / "00.txt").write_bytes(b"caf\xe9")
    with pytest.raises(PairError, match=r"0xe9 at byte 3"):
        open_inputs(folder, "text").read(0)
    assert open_inputs(folder, "text", options=latin).read(0) == "café"


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_not_utf8(folder):
    (folder / "00.png").rename(folder / "caf\udce9.png")
    assert contents(open_inputs(folder))[4][0] == "caf\udce9.png"
    (folder / "list.txt").write_bytes(b"caf\xe9.png\n01.png\n")
    assert [name for name, _ in contents(open_inputs(folder / "list.txt"))] == ["caf\udce9.png", "01.png"]
    # where no such file is, it is the encoding that is wrong
    (folder / "list.txt").write_bytes(b"caf\xe9.png\nna\xefve.png\n")
    with pytest.raises(ValueError, match=r"0xe9 at byte 3, .*--encoding"):
        open_inputs(folder / "list.txt")


def test_links_other_kinds_and_patterns(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    small.picture(7).save(tmp_path / "elsewhere" / "far.tiff")
    small.picture(8).save(tmp_path / "elsewhere" / "q.PPM", "PPM")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "circle").symlink_to(folder)
    (folder / "v.mp4").write_bytes(b"x")
    with pytest.warns(
        UserWarning, match=r"1 files of other kinds \(1 \.mp4\); 1 links that lead in a circle \(circle\)"
    ):
        inputs = open_inputs(folder)
    assert [name for name, _ in contents(inputs)][-3:] == ["below/z.jpg", "link/far.tiff", "link/q.PPM"]
    os.mkfifo(folder / "pipe.png")
    with pytest.warns(UserWarning, match="circle"):
        inputs = open_inputs(folder)
    with pytest.raises(OSError, match="it is no file"):
        inputs.read([inputs.name(i) for i in range(len(inputs))].index("pipe.png"))
    odd = tmp_path / "{1}::[x]"
    (folder / "circle").unlink()
    (folder / "v.mp4").unlink()
    folder.rename(odd)
    assert len(open_inputs(odd)) == len(inputs)


def test_parquet(folder):
    data = [(folder / f"{i:02d}.png").read_bytes() for i in range(4)]
    table = pyarrow.table(
        {
            "path": ["00.png", "01.png", None, "03.png"],
            "data": data,
            "caption": ["a", "bé", "", None],
            "number": [1, 2, 3, 4],
        }
    )
    parquet.write_table(table, folder / "t.parquet", row_group_size=2)
    paths = open_inputs(folder / "t.parquet")
    assert (paths.read(3), paths.name(3)) == (data[3], "03.png")
    with pytest.raises(PairError, match=r"t\.parquet/2: got nothing in the column 'path'"):
        paths.read(2)
    in_bytes = contents(open_inputs(folder / "t.parquet", column="data"))
    assert in_bytes == [(f"t.parquet/{i}", data[i]) for i in range(4)]
    texts = open_inputs(folder / "t.parquet", "text")
    assert [texts.read(i) for i in (0, 2, 1, 0)] == ["a", "", "bé", "a"]
    with pytest.raises(ValueError, match=r"column: got path, data, caption, number in .*, expected 'words'"):
        open_inputs(folder / "t.parquet", "text", "words")
    with pytest.raises(ValueError, match="got 'number' of int64"):
        open_inputs(folder / "t.parquet", "text", "number")
    with pytest.raises(ValueError, match="got 'data' of binary .* expected strings"):
        open_inputs(folder / "t.parquet", "text", "data")
    parquet.write_table(table.select(["number"]), folder / "n.parquet")
    with pytest.raises(ValueError, match="expected one of filepath, image, .*or --image-column"):
        open_inputs(folder / "n.parquet")


def test_shards_and_tables(folder):
    source = open_pairs(folder)
    write_shards((source.read(i) for i in range(4)), folder / "shards", shard_size=3)
    images = contents(open_inputs(folder / "shards"))
    assert [name for name, _ in images] == [f"0000{i // 3}.tar/00000000{i}" for i in range(4)]
    texts = contents(open_inputs(folder / "shards" / "0000{0..1}.tar", "text"))
    assert [text for _, text in texts] == [(folder / f"{i:02d}.txt").read_text() for i in range(4)]
    with (folder / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), ("02.png", "two")])
    assert contents(open_inputs(folder / "t.csv", "text")) == [("two", "two")]
    (folder / "u.csv").write_text("picture,words\n02.png,two\n")
    with pytest.raises(ValueError, match=r"got the columns picture, words in .*u\.csv, expected 'photo', or --image"):
        open_inputs(folder / "u.csv", column="photo")
    options = DataOptions(image_column="picture")
    assert contents(open_inputs(folder / "u.csv", "text", "words", options)) == [("two", "two")]
    # a column is enough
    (folder / "v.csv").write_text("filepath\n02.png\n01.png\n")
    assert [data for _, data in contents(open_inputs(folder / "v.csv"))] == [
        (folder / f"{i:02d}.png").read_bytes() for i in (2, 1)
    ]
    (folder / "w.tsv").write_text("id\ttext\n7\tone\n7\ttwo\n")
    assert contents(open_inputs(folder / "w.tsv", "text")) == [("one", "one"), ("two", "two")]
    with pytest.raises(ValueError, match=r"got the columns filepath in .*v\.csv, expected one of \('title'"):
        open_inputs(folder / "v.csv", "text")


def test_a_fingerprint_sees_what_moves_rows(folder):
    first = open_inputs(folder).fingerprint()
    assert open_inputs(folder).fingerprint() == first != open_inputs(folder, "text").fingerprint()
    small.picture(0).save(folder / "0.png")
    assert open_inputs(folder).fingerprint() != first
    seen = set()
    for texts in ("ab\nc", "a\nbc", "c\nab"):
        (folder / "t.txt").write_text(texts)
        seen.add(open_inputs(folder / "t.txt", "text").fingerprint())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("missing", "image", "none is there"),
        ("empty", "image", r"got no pictures \(\.jpg"),
        ("empty", "text", r"got no texts \(\.txt\)"),
        ("blank.txt", "text", "got no texts in"),
        ("latin.txt", "text", "expected UTF-8: give --encoding"),
        ("x.xlsx", "image", r"expected a folder, a \.txt list"),
        ("cut.parquet", "image", "got no whole Parquet file"),
        ("none.parquet", "image", "got no rows"),
        ("empty", "sound", "kind: got 'sound'"),
    ],
)
def test_mistakes(tmp_path, name, kind, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "x.xlsx").write_bytes(b"x")
    parquet.write_table(pyarrow.table({"path": pyarrow.array([], pyarrow.string())}), tmp_path / "none.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "none.parquet").read_bytes()[:-9])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_inputs(tmp_path / name, kind)


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"")
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow.*: pip install 'clipfast\[embed\]'"):
        open_inputs(tmp_path / "t.parquet")
