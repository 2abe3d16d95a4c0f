"""A sample is its place: nothing that shares a name with another is taken for it."""

from __future__ import annotations

import os

import pytest
from samples import png, write_tar

from clipfast.data.labelled import open_labelled
from clipfast.data.pairs import DistinctPictures, PairError
from clipfast.data.shard_index import scan_shard
from clipfast.data.sources import open_pairs
from clipfast.embed.reader import open_inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def sample(key: str, number: int, extension: str = "png") -> list[tuple[str, bytes]]:
    return [(f"{key}.{extension}", png(number)), (f"{key}.txt", f"caption {number}".encode())]


def contents(source) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return key, number of the picture and captions of all pairs, and check that the parts are those of the whole."""
    numbers = {png(i): i for i in range(20)}
    found = []
    for index in range(len(source)):
        pair = source.read(index)
        assert (pair.key, pair.image) == (source.key(index), source.image(index))
        assert (pair.captions, pair.unusable) == tuple(source.captions(index))
        found.append((pair.key, numbers[pair.image], pair.captions))
    return found


@pytest.mark.parametrize("pattern", ["{0}/a/0.tar::{0}/b/0.tar", "{0}/{{a,b}}/0.tar", "{0}/*/0.tar", "{0}"])
def test_shards_of_one_name_in_two_folders(tmp_path, pattern):
    for folder, first in (("a", 0), ("b", 3)):
        write_tar(tmp_path / folder / "0.tar", [m for i in range(3) for m in sample(f"{i}", first + i)])
    place = pattern.format(tmp_path)
    found = contents(open_pairs(place))
    expected = [f"{folder}/0.tar/{i}" for folder in "ab" for i in range(3)]
    assert found == [(key, i, (f"caption {i}",)) for i, key in enumerate(expected)]
    for kind, named in (("image", expected), ("text", [f"caption {i}" for i in range(6)])):
        inputs = open_inputs(place, kind)
        read = [inputs.read(row) for row in range(len(inputs))]
        assert read == ([png(i) for i in range(6)] if kind == "image" else named)
        assert [inputs.name(row) for row in range(6)] == named


def test_a_shard_that_is_named_twice_is_told(tmp_path):
    path = write_tar(tmp_path / "0.tar", sample("x", 0))
    with pytest.warns(UserWarning, match=r"got .*0\.tar 2 times: its samples count as often"):
        assert len(open_pairs(f"{path}::{path}")) == 2


def test_a_key_that_comes_twice_is_two_samples(tmp_path):
    members = [*sample("x", 0), *sample("x", 1), *sample("y", 2), *sample("x", 3), *sample("d/x", 4), *sample("x#2", 5)]
    found = contents(open_pairs(write_tar(tmp_path / "0.tar", members)))
    assert [number for _, number, _ in found] == [0, 1, 2, 3, 4, 5]
    assert [texts for *_, texts in found] == [(f"caption {i}",) for i in range(6)]
    assert len({key for key, *_ in found}) == 6
    assert found[0][0] == "0.tar/x"


def test_pictures_alone_of_one_name(tmp_path):
    path = write_tar(tmp_path / "0.tar", [("x.png", png(0)), ("y.png", png(1)), ("x.png", png(2))])
    inputs = open_inputs(path)
    assert [inputs.read(row) for row in range(3)] == [png(0), png(1), png(2)]
    assert len({inputs.name(row) for row in range(3)}) == 3
    with pytest.raises(PairError, match=r"0\.tar/y: got png, expected a picture and a caption"):
        open_pairs(path).read(1)


def test_files_of_a_sample_need_not_be_neighbours(tmp_path):
    members = [
        ("b.png", png(1)),
        ("a.png", png(0)),
        ("a.json", b"{}"),
        ("a.txt", b"caption 0"),
        ("b.txt", b"caption 1"),
    ]
    found = contents(open_pairs(write_tar(tmp_path / "0.tar", members)))
    assert found == [("0.tar/b", 1, ("caption 1",)), ("0.tar/a", 0, ("caption 0",))]


@pytest.mark.parametrize(
    "names",
    [
        "x.png x.png x.txt x.txt",
        "x.png x.txt y.png y.txt x.png",
        "x.png y.png y.txt x.txt x.txt",
        "x.txt x.txt x.png",
        "x.PNG x.png x.txt",
    ],
)
def test_where_nobody_can_tell_it_is_an_error_of_that_sample(tmp_path, names):
    members = [(name, png(i) if name.lower().endswith("png") else b"words") for i, name in enumerate(names.split())]
    source = open_pairs(write_tar(tmp_path / "0.tar", [*members, *sample("z", 9)]))
    keys = [source.key(index) for index in range(len(source))]
    assert keys.count("0.tar/x") == 1
    with pytest.raises(PairError, match=r"0\.tar/x: its name comes \d times, with .*nobody can tell"):
        source.read(keys.index("0.tar/x"))
    assert source.read(keys.index("0.tar/z")).image == png(9)


def test_links_in_a_shard_are_followed(tmp_path):
    members = [
        ("deep/a.png", png(0)),
        ("deep/a.txt", b"caption 0"),
        ("deep/hard.png", "=deep/a.png"),
        ("deep/hard.txt", b"caption 1"),
        ("soft.png", "later.png"),
        ("soft.txt", "./deep/a.txt"),
        ("lost.png", "nowhere.png"),
        ("lost.txt", b"caption 3"),
        ("later.png", png(4)),
        ("later.txt", b"caption 4"),
    ]
    source = open_pairs(write_tar(tmp_path / "0.tar", members))
    assert [source.key(i) for i in range(5)] == [f"0.tar/{k}" for k in ("deep/a", "deep/hard", "soft", "lost", "later")]
    assert [source.read(i).image for i in (0, 1, 2, 4)] == [png(0), png(0), png(4), png(4)]
    assert source.captions(2).texts == ("caption 0",)
    with pytest.raises(PairError, match=r"lost: png: got a link to what the shard lacks"):
        source.read(3)


def test_names_and_endings(tmp_path):
    members = [
        *sample("./A", 0, "PNG"),
        *sample("cat.small", 1),
        ("two.a.png", png(2)),
        ("two.b.png", png(3)),
        ("two.txt", b""),
    ]
    source = open_pairs(write_tar(tmp_path / "0.tar", members))
    assert [source.key(i) for i in range(3)] == ["0.tar/A", "0.tar/cat", "0.tar/two"]
    assert (source.read(0).image, source.read(1).image) == (png(0), png(1))
    with pytest.raises(PairError, match=r"two: got a\.png, b\.png, txt, expected one of them"):
        source.image(2)


def test_a_shard_that_was_rewritten_is_read_anew(tmp_path):
    path = write_tar(tmp_path / "0.tar", [*sample("a", 0), *sample("b", 1)])
    source = open_pairs(path)
    assert source.read(1).captions == ("caption 1",)
    before = path.stat()
    write_tar(path, [*sample("c", 2), *sample("d", 3)])
    # of the same size and time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert [key for key, *_ in contents(source)] == ["0.tar/c", "0.tar/d"]
    write_tar(path, sample("e", 4))
    with pytest.raises(PairError, match="changed or gone since it was counted: got 1 samples, expected 2"):
        source.read(0)
    assert contents(open_pairs(path)) == [("0.tar/e", 4, ("caption 4",))]


def test_classes_of_shards(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    for folder in ("a", "b"):
        members = [(f"{i}.{kind}", png(i) if kind == "png" else b"1") for i in range(2) for kind in ("png", "cls")]
        write_tar(tmp_path / folder / "0.tar", members)
    write_tar(tmp_path / "c" / "0.tar", [("x.png", png(4)), ("y.png", png(5)), ("y.cls", b"0"), ("x.cls", b"1")])
    source = open_labelled(tmp_path / "{a,b,c}" / "0.tar")
    assert [source.name(i) for i in range(6)] == [
        "a/0.tar/0",
        "a/0.tar/1",
        "b/0.tar/0",
        "b/0.tar/1",
        "c/0.tar/x",
        "c/0.tar/y",
    ]
    assert source.labels == [1, 1, 1, 1, 1, 0]
    assert source.read(4) == png(4)
    write_tar(tmp_path / "c" / "0.tar", [("x.png", png(6)), ("x.cls", b"0")])
    with pytest.raises(PairError, match="changed since its classes were read"):
        source.read(4)
    write_tar(tmp_path / "c" / "0.tar", [("x.png", png(6)), ("x.png", png(7)), ("x.cls", b"0")])
    with pytest.raises(ValueError, match="x: its name comes 2 times"):
        open_labelled(tmp_path / "c" / "0.tar", tmp_path / "classnames.txt")


def test_pictures_of_one_name_in_folders(tmp_path):
    for number, folder in enumerate(("a", "b")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.PNG").write_bytes(png(number))
        (tmp_path / folder / "x.TXT").write_text(f"caption {number}")
    found = contents(open_pairs(tmp_path))
    assert found == [(str(tmp_path / f / "x.PNG"), i, (f"caption {i}",)) for i, f in enumerate("ab")]


def test_a_table_may_name_a_picture_twice(tmp_path):
    (tmp_path / "x.png").write_bytes(png(0))
    (tmp_path / "t.csv").write_text("filepath,title\nx.png,one\n./x.png,two\n")
    assert contents(open_pairs(tmp_path / "t.csv")) == [(str(tmp_path / "x.png"), 0, (t,)) for t in ("one", "two")]


def test_a_picture_is_measured_once(tmp_path):
    (tmp_path / "x.png").write_bytes(png(0))
    (tmp_path / "y.png").write_bytes(png(1))
    rows = "filepath,title\nx.png,one\n,\ny.png,three\nx.png,four\nlost.png,five\ny.png,six\n"
    (tmp_path / "t.csv").write_text(rows)
    source = open_pairs(tmp_path / "t.csv")
    found = DistinctPictures(source, 5)
    assert [found.captions(i).texts for i in (0, 2, 3)] == [("one",), ("three",), ("five",)]
    assert (len(found), found.read(2).image) == (4, png(1))
    shards = open_pairs(write_tar(tmp_path / "0.tar", [*sample("x", 0), *sample("x", 1), *sample("y", 2)]))
    assert contents(DistinctPictures(shards, 2)) == contents(shards)[:2]


@pytest.mark.parametrize("kept", [0.2, 0.4, 0.6])
def test_a_shard_that_was_cut_gives_what_is_whole(tmp_path, kept):
    members = [m for i in range(10) for m in sample(f"{i}", i)]
    # all captions last: a cut leaves pictures without them
    path = write_tar(tmp_path / "0.tar", sorted(members, key=lambda member: member[0].endswith("txt")))
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    samples, problem = scan_shard(path)
    assert problem is not None
    whole = [s for s in samples if len(s.parts) == 2]
    assert all(s.parts[1][1] + s.parts[1][2] <= path.stat().st_size for s in whole)
    with pytest.warns(UserWarning, match="broken"):
        source = open_pairs(path)
    assert [source.read(i).captions for i, s in enumerate(samples) if len(s.parts) == 2] == [
        (f"caption {i}",) for i in range(len(whole))
    ]
