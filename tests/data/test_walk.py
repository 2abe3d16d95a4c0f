from __future__ import annotations

import os
import warnings

import pytest
from PIL import Image

from clipfast.data.patterns import expand_pattern, expand_shards, find_shards
from clipfast.data.pictures import PICTURES, ending_of, is_picture
from clipfast.data.walk import files_below, join, tell_left_out


def touch(*paths) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_endings_are_pillows_own():
    assert PICTURES[:3] == (".jpg", ".jpeg", ".png")
    assert len(set(PICTURES)) == len(PICTURES)
    Image.init()
    for name in ("a.JPG", "b.jfif", "c.Jp2", "d.j2k", "e.ppm", "f.PGM", "g.TIF", "h.webp", "i.bmp", "j.gif", "k.mpo"):
        assert is_picture(name), name
    assert is_picture("a.avif") == (".avif" in Image.EXTENSION)
    for name in ("a.txt", "a.json", "a.pdf", "a.eps", "a.mpg", "a.h5", "a.svg", "jpg", ".jpg", "a.jpg.txt", "a.tar"):
        assert not is_picture(name), name
    assert ending_of("x.y/a.Tar.GZ") == ".gz"


def test_what_lies_below_a_folder(tmp_path):
    touch(
        *(tmp_path / name for name in ("b.JPG", "a/x.png", "a-b/y.png", "a/deep/z.png", "a.mp4", "a/v.MP4", "README"))
    )
    below = files_below(tmp_path, PICTURES)
    assert below.ordered() == ["a/deep/z.png", "a/x.png", "a-b/y.png", "b.JPG"]
    assert below.left_out == {".mp4": 2, "": 1}
    assert not below.circles
    assert not below.closed


def test_links_are_followed_and_circles_noticed(tmp_path):
    top = tmp_path / "top"
    touch(tmp_path / "elsewhere" / "e.png", top / "a" / "x.png")
    (top / "far").symlink_to(tmp_path / "elsewhere")
    (top / "near").symlink_to("a")
    (top / "a" / "up").symlink_to("..")
    (tmp_path / "elsewhere" / "back").symlink_to(top)
    (top / "lost.png").symlink_to("nowhere.png")
    (top / "self").symlink_to("self")
    below = files_below(top, PICTURES)
    assert below.ordered() == ["a/x.png", "far/e.png", "lost.png", "near/x.png"]
    assert sorted(below.circles) == ["a/up", "far/back", "near/up"]
    with pytest.warns(
        UserWarning, match=r"left out of .*top: 1 files of other kinds \(1 without an ending\); 3 links that "
    ):
        tell_left_out(top, below)


def test_left_out_kinds_are_counted_and_named(tmp_path):
    touch(*(tmp_path / f"{i}.heic" for i in range(3)), *(tmp_path / f"{i}.k{i}" for i in range(9)), tmp_path / "a.json")
    below = files_below(tmp_path, PICTURES)
    with pytest.warns(UserWarning, match=r"12 files of other kinds \(3 .heic, (1 .k\d, ){7}2 kinds more\)$"):
        tell_left_out(tmp_path, below, besides=(".json",))
    with pytest.warns(UserWarning, match=r"2 words; 13 files of other kinds"):
        tell_left_out(tmp_path, join([("x", below)]), more="2 words")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tell_left_out(tmp_path, files_below(tmp_path, (".heic", ".json", *(f".k{i}" for i in range(9)))))


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
def test_names_that_are_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    assert files_below(tmp_path, PICTURES).files == ["caf\udce9.png"]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        files_below(tmp_path / "x", PICTURES)
    touch(tmp_path / "file")
    with pytest.raises(NotADirectoryError):
        files_below(tmp_path / "file", PICTURES)


# --- patterns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["{1}", "a{1,2}b", "x::y", "x::{0..3}", "[b]", "}{"])
def test_what_exists_is_taken_as_it_is(tmp_path, folder):
    place = tmp_path / folder
    touch(place / "0.tar", place / "1.tar", place / "t{0..9}.tar")
    whole = str(place / "t{0..9}.tar")
    assert expand_pattern(str(place)) == [str(place)]
    assert expand_pattern(whole) == [whole]
    # what follows a folder that exists is a pattern still
    numbered = [str(place / "0.tar"), str(place / "1.tar")]
    assert expand_pattern(str(place / "{0..1}.tar")) == numbered
    assert expand_pattern("::".join([*numbered, whole])) == [*numbered, whole]
    assert [str(p) for p in find_shards(str(place))] == sorted([*numbered, whole])
    touch(place / "a.csv", place / "{b}.csv")
    assert find_shards(str(place / "{b}.csv")) == []


def test_patterns_of_what_does_not_exist():
    assert expand_pattern("a/{0..2}.tar") == ["a/0.tar", "a/1.tar", "a/2.tar"]
    assert expand_pattern("a.tar::b{1,2}.tar::c") == ["a.tar", "b1.tar", "b2.tar", "c"]
    with pytest.raises(FileNotFoundError, match=r"2 of 2 shards are missing, the first is x/0.tar"):
        expand_shards("x/{0..1}.tar")
    with pytest.raises(ValueError, match="got s3://b/0.tar, expected files"):
        find_shards("s3://b/{0..1}.tar")


def test_a_path_from_the_folder_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path / "{a}.tar", tmp_path / "b::c.tar", tmp_path / "d.tar")
    assert expand_pattern("{a}.tar::b::c.tar::d.tar") == ["{a}.tar", "b::c.tar", "d.tar"]
