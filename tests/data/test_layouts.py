"""What data sets look like as they come: told by content, or an error that says what was found."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from samples import png, write_tar

from clipfast.data.labelled import has_labels, open_labelled
from clipfast.data.options import DataOptions
from clipfast.data.pairs import PairError
from clipfast.data.sources import open_pairs
from clipfast.embed.reader import open_inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def pictures(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))


def contents(source) -> list[tuple[int, tuple[str, ...]]]:
    """Return number of the picture and captions of all pairs."""
    known = {png(i): i for i in range(10)}
    return [(known[source.image(i)], source.captions(i).texts) for i in range(len(source))]


# --- img2dataset, CC12M -----------------------------------------------------------------------------------


def img2dataset(folder: Path, kind: str) -> list[tuple[int, tuple[str, ...]]]:
    """Write what img2dataset writes of three URLs, of which the second failed."""
    metadata = {
        "key": ["000000000", "000000001", "000000002"],
        "url": ["http://a"] * 3,
        "caption": ["zero", "one", "two"],
    }
    metadata["status"] = ["success", "failed_to_download", "success"]
    members = []
    for i, word in ((0, "zero"), (2, "two")):
        fields = {"caption": word, "key": f"{i:09d}", "url": "http://a", "sha256": "0", "width": 8, "exif": "{}"}
        members += [(f"{i:09d}.jpg", png(i)), (f"{i:09d}.json", json.dumps(fields).encode())]
        members += [(f"{i:09d}.txt", word.encode())]
    if kind == "webdataset":
        write_tar(folder / "00000.tar", members)
    if kind == "files":
        for name, data in members:
            (folder / "00000").mkdir(parents=True, exist_ok=True)
            (folder / "00000" / name).write_bytes(data)
    folder.mkdir(exist_ok=True)
    if kind == "parquet":
        metadata["jpg"] = [png(0), None, png(2)]
    parquet.write_table(pyarrow.table(metadata), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text(json.dumps({"count": 3, "successes": 2}))
    return [(0, ("zero",)), (2, ("two",))]


@pytest.mark.parametrize("kind", ["webdataset", "files", "parquet"])
def test_img2dataset(tmp_path, kind):
    expected = img2dataset(tmp_path / "laion", kind)
    source = open_pairs(tmp_path / "laion")
    if kind == "parquet":
        with pytest.raises(PairError, match=r"00000\.parquet/1: got nothing in the column 'jpg'"):
            source.read(1)
        assert [(png(0), "zero"), (png(2), "two")] == [source.read(i)[1:3] for i in (0, 2)]
    else:
        assert contents(source) == expected
    assert not has_labels(str(tmp_path / "laion"))


def test_cc12m(tmp_path):
    """Its list names URLs; as shards, some have captions in the JSON alone."""
    (tmp_path / "cc12m.tsv").write_text('http://a/b.jpg\tA "quoted" caption\nhttp://c/d.jpg\tanother\n')
    with pytest.raises(ValueError, match="got URLs in .*cc12m.tsv, expected paths of pictures: fetch them first"):
        open_pairs(tmp_path / "cc12m.tsv")
    (tmp_path / "urls.csv").write_text("image,caption\nhttps://a/b.jpg,one\n")
    with pytest.raises(ValueError, match="got URLs such as 'https://a/b.jpg' in .*urls.csv"):
        open_pairs(tmp_path / "urls.csv")
    members = [
        ("cc12m/0.jpg", png(0)),
        ("cc12m/0.json", b'{"caption": "zero", "url": "http://a"}'),
        ("cc12m/0.cls", b"1"),
    ]
    write_tar(tmp_path / "cc12m-train-0000.tar", members)
    assert contents(open_pairs(tmp_path / "cc12m-train-{0000..0000}.tar")) == [(0, ("zero",))]


# --- COCO -------------------------------------------------------------------------------------------------

COCO = {
    "info": {},
    "images": [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}, {"id": 4, "file_name": "4.jpg"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "three"},
        {"image_id": 7, "id": 2, "caption": "seven\n"},
        {"image_id": 3, "id": 3, "caption": "drei"},
        {"image_id": 3, "id": 4, "caption": None},
        {"image_id": 9, "id": 5, "caption": "not of this set"},
    ],
}


@pytest.mark.parametrize("place", ["val2017", "images/val2017", "images", "annotations/val2017", "annotations"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_coco(tmp_path, place, given):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2017.json").write_text(json.dumps(COCO))
    pictures(tmp_path / place, ["7.jpg", "3.jpg", "4.jpg"])
    path = tmp_path if given == "folder" else tmp_path / "annotations" / "captions_val2017.json"
    source = open_pairs(path)
    assert contents(source) == [(0, ("seven\n",)), (1, ("three", "drei"))]
    assert source.read(1).unusable == (("caption 3", "got null, expected a text"),)
    assert source.key(1) == str(tmp_path / place / "3.jpg")
    assert not has_labels(str(path))
    inputs = open_inputs(path, "text")
    assert [inputs.read(row) for row in range(3)] == ["seven\n", "three", "drei"]


def test_coco_of_two_splits(tmp_path):
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / "annotations" / f"captions_{split}.json").write_text(json.dumps(COCO))
        pictures(tmp_path / split, ["7.jpg", "3.jpg"])
    with pytest.raises(
        ValueError, match=r"holds annotations .*train2017.json, .*val2017.json, expected .*name the file"
    ):
        open_pairs(tmp_path)
    source = open_pairs(tmp_path / "annotations" / "captions_val2017.json")
    assert source.key(0) == str(tmp_path / "val2017" / "7.jpg")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            {"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []},
            "got the id 1 for a and b",
        ),
        ({"images": [], "annotations": []}, "got no picture with a caption"),
        ({"categories": []}, "expected COCO's JSON .*KeyError: 'images'"),
        ([1], "expected COCO's JSON"),
        ({"images": [{"id": 1}], "annotations": []}, "KeyError: 'file_name'"),
    ],
)
def test_other_json(tmp_path, found, message):
    (tmp_path / "captions_x.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
        open_pairs(tmp_path / "captions_x.json")


def test_karpathys_splits(tmp_path):
    pictures(tmp_path / "val2014", ["a.jpg", "b.jpg"])
    images = [
        {
            "filepath": "val2014",
            "filename": name,
            "split": "test",
            "sentences": [{"raw": f"{name} {i}"} for i in range(2)],
        }
        for name in ("a.jpg", "b.jpg")
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    expected = [(0, ("a.jpg 0", "a.jpg 1")), (1, ("b.jpg 0", "b.jpg 1"))]
    assert contents(open_pairs(tmp_path / "dataset_coco.json")) == contents(open_pairs(tmp_path)) == expected


# --- Flickr -----------------------------------------------------------------------------------------------

FLICKR = {
    "results_20130124.token": 'a.jpg#0\tOne , "two"\na.jpg#1\tthree\nb.jpg#0\tfour\n',
    "Flickr8k.token.txt": 'a.jpg#0\tOne , "two"\r\na.jpg#1\tthree\r\nb.jpg#0\tfour\r\n',
    "captions.txt": 'image,caption\na.jpg,One , "two"\nb.jpg,four\na.jpg,three\n',
    "results.csv": 'image_name| comment_number| comment\na.jpg| 0| One , "two"\na.jpg| 1| three\nb.jpg| 0| four\n',
    "flickr30k.txt": 'image_name,comment_number,comment\na.jpg,0,One , "two"\na.jpg,1,three\nb.jpg,0,four\n',
}


@pytest.mark.parametrize("name", FLICKR)
@pytest.mark.parametrize("folder", ["", "Images", "flickr30k_images"])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_flickr(tmp_path, name, folder, given):
    (tmp_path / name).write_text(FLICKR[name], newline="")
    (tmp_path / "readme.txt").write_text("About these pictures: image, caption.\n")
    pictures(tmp_path / folder, ["a.jpg", "b.jpg"])
    path = tmp_path / name if given == "file" else tmp_path
    assert contents(open_pairs(path)) == [(0, ('One , "two"', "three")), (1, ("four",))]
    assert not has_labels(str(path))
    inputs = open_inputs(path, "text")
    assert [inputs.read(row) for row in range(3)] == ['One , "two"', "three", "four"]
    inputs = open_inputs(path, "image")
    assert [inputs.read(row) for row in range(len(inputs))] == [png(0), png(1)]


def test_rows_that_are_none_are_errors_of_their_own(tmp_path):
    """Flickr30k's ``results.csv`` has such a row."""
    pictures(tmp_path, ["a.jpg", "b.jpg"])
    rows = "image_name| comment_number| comment\na.jpg| 0| one\na.jpg| 4   A dog runs .\nb.jpg| 0|\nb.jpg| 1| two\n"
    (tmp_path / "results.csv").write_text(rows)
    source = open_pairs(tmp_path / "results.csv")
    assert [source.read(i)[2:] for i in range(2)] == [
        ("one", (), (("line 3", "its caption is empty"),)),
        ("two", (), (("line 4", "its caption is empty"),)),
    ]


@pytest.mark.parametrize(
    ("rows", "bad"),
    [
        (
            "filepath,title\na.jpg,one, two\nb.jpg,three\n",
            r"line 2: got 3 cells, expected 2: does a caption lack its quotes\?",
        ),
        ("filepath,title\n,one\nb.jpg,three\n", "line 2: got no path"),
        ("title,filepath\none\nthree,b.jpg\n", "line 2: got 1 cells, expected 2"),
    ],
)
def test_rows_of_other_lengths(tmp_path, rows, bad):
    pictures(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "t.csv").write_text(rows)
    source = open_pairs(tmp_path / "t.csv")
    with pytest.raises(PairError, match=bad):
        source.read(0)
    assert source.read(1)[1:3] == (png(1), "three")


# --- what is chosen, and what is ambiguous ----------------------------------------------------------------


def test_columns_and_separators(tmp_path):
    pictures(tmp_path, ["a.jpg"])
    (tmp_path / "t.csv").write_text('photo;words;title;filepath\na.jpg;"x; ""y""";wrong;wrong\n')
    options = DataOptions(image_column="photo", caption_column="words")
    assert contents(open_pairs(tmp_path / "t.csv", options)) == [(0, ('x; "y"',))]
    assert DataOptions(separator="tab").separator == DataOptions(separator="\\t").separator == "\t"
    (tmp_path / "u.csv").write_text("photo^words\na.jpg^x,y\n")
    options = DataOptions(image_column="photo", caption_column="words", separator="^")
    assert contents(open_pairs(tmp_path / "u.csv", options)) == [(0, ("x,y",))]
    with pytest.raises(ValueError, match=r"got the columns photo\^words in .*u\.csv, expected one of \('filepath'"):
        open_pairs(tmp_path / "u.csv")
    with pytest.raises(ValueError, match="separator: got ', ', expected one character"):
        DataOptions(separator=", ")


def test_names_in_any_case(tmp_path):
    pictures(tmp_path, ["a.jpg"])
    (tmp_path / "t.csv").write_text("Image,Caption\na.jpg,one\n")
    assert contents(open_pairs(tmp_path / "t.csv")) == [(0, ("one",))]
    parquet.write_table(pyarrow.table({"Image": [png(0)], "TEXT": ["one"]}), tmp_path / "a.parquet")
    assert contents(open_pairs(tmp_path / "a.parquet")) == [(0, ("one",))]


def test_a_folder_of_several_kinds(tmp_path):
    pictures(tmp_path, ["a.jpg", "b.jpg"])
    (tmp_path / "a.txt").write_text("beside")
    (tmp_path / "t.csv").write_text("filepath,title\na.jpg,listed\n")
    with pytest.raises(
        ValueError, match="holds a table t.csv, pictures with captions beside them, expected pairs of one"
    ):
        open_pairs(tmp_path)
    assert contents(open_pairs(tmp_path / "t.csv")) == [(0, ("listed",))]
    (tmp_path / "t.csv").write_text("name,price\na,1\n")
    with pytest.warns(UserWarning, match="1 pictures without captions beside them"):
        assert contents(open_pairs(tmp_path)) == [(0, ("beside",))]


def test_pictures_in_two_folders_beside_a_table(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,one\n")
    for folder in ("x", "y"):
        pictures(tmp_path / folder, ["a.jpg"])
    with pytest.raises(ValueError, match="got pictures such as a.jpg in .*x and in .*y, expected one folder"):
        open_pairs(tmp_path / "captions.txt")


def test_json_beside_pictures(tmp_path):
    pictures(tmp_path, ["a.JPG", "b.jpg"])
    (tmp_path / "a.JSON").write_text('{"caption": ["one", "two"], "alt": "three"}')
    (tmp_path / "b.json").write_text('{"caption": 4, "alt": "five"}')
    source = open_pairs(tmp_path)
    assert source.captions(0).texts == ("one", "two")
    with pytest.raises(PairError, match=r"b\.jpg: caption: got the number 4"):
        source.captions(1)
    assert [t for _, t in contents(open_pairs(tmp_path, DataOptions(caption_key="alt")))] == [("three",), ("five",)]


def test_classes_are_still_classes(tmp_path):
    pictures(tmp_path, ["cat/a.jpg", "dog/b.jpg"])
    (tmp_path / "notes.txt").write_text("collected in May\n")
    # a stray archive makes no shards of pictures
    write_tar(tmp_path / "cat" / "more.tar", [("x.png", png(0)), ("x.txt", b"words")])
    assert has_labels(str(tmp_path))
    assert len(open_labelled(tmp_path)) == 2
    pictures(tmp_path, ["dog/c.jpg"])
    (tmp_path / "cat" / "a.txt").write_text("a stray text")
    assert has_labels(str(tmp_path))
    (tmp_path / "dog" / "b.json").write_text("{}")
    assert not has_labels(str(tmp_path))
