"""Pairs in Parquet files, with paths, bytes and Hugging Face's structs of both."""

from __future__ import annotations

import pickle
import sys

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from samples import png

from clipfast.data import parquet_rows
from clipfast.data.batches import Shares, training_batches
from clipfast.data.options import DataOptions
from clipfast.data.pairs import PairError
from clipfast.data.sources import open_pairs
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.transform import image_transform
from clipfast.embed.reader import open_inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path, columns: dict, rows: int = 2, **types):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({k: pyarrow.array(v, types.get(k)) for k, v in columns.items()})
    parquet.write_table(table, path, row_group_size=rows)
    return path


def contents(source) -> list[tuple[bytes, tuple[str, ...]]]:
    return [(source.image(i), source.captions(i).texts) for i in range(len(source))]


EXPECTED = [(png(i), (f"caption {i}",)) for i in range(5)]
CAPTIONS = [f"caption {i}" for i in range(5)]


@pytest.mark.parametrize(
    "kind", ["bytes", "large", "paths", "below", "dictionary", "struct", "struct_of_paths", "chosen"]
)
def test_pictures_and_captions(tmp_path, kind):
    data = [png(i) for i in range(5)]
    paths = [f"{i}.png" for i in range(5)]
    columns, options, types = {"caption": CAPTIONS, "id": [0] * 5}, None, {}
    folder = tmp_path / "images" if kind == "below" else tmp_path
    if kind in ("paths", "below", "dictionary", "struct_of_paths"):
        folder.mkdir(exist_ok=True)
        for name, content in zip(paths, data, strict=True):
            (folder / name).write_bytes(content)
    if kind == "bytes":
        columns |= {"jpg": data, "path": ["same.jpg"] * 5}
    if kind == "large":
        columns |= {"image": data}
        types = {"image": pyarrow.large_binary(), "caption": pyarrow.large_string()}
    if kind in ("paths", "below", "dictionary"):
        columns |= {"filepath": paths}
    if kind == "dictionary":
        types = {"filepath": pyarrow.dictionary(pyarrow.int32(), pyarrow.string())}
    if kind == "struct":
        columns |= {"image": [{"bytes": d, "path": "same.png"} for d in data], "filename": ["same.png"] * 5}
    if kind == "struct_of_paths":
        columns |= {"image": [{"bytes": None, "path": str(folder / p)} for p in paths]}
        types = {"image": pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])}
    if kind == "chosen":
        columns = {"a": data, "b": CAPTIONS, "caption": [None] * 5, "image": ["x"] * 5}
        options = DataOptions(image_column="a", caption_column="b")
    source = open_pairs(write(tmp_path / "data.parquet", columns, **types), options)
    assert contents(source) == EXPECTED
    assert list(source.groups) == [2, 2, 1]
    assert len({source.key(i) for i in range(5)}) == 5
    assert pickle.loads(pickle.dumps(source)).read(4).captions == ("caption 4",)


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([["a", "b", None, ""], ["c"]], [("a", "b"), ("c",)]),
        ([{"raw": "a", "tokens": ["a"]}, {"raw": "b", "tokens": []}], [("a",), ("b",)]),
        ([[{"raw": "a"}, {"raw": "b"}], [{"raw": "c"}]], [("a", "b"), ("c",)]),
        ([{"raw": ["a", "b"], "id": [1, 2]}, {"raw": ["c"], "id": [3]}], [("a", "b"), ("c",)]),
    ],
)
def test_several_captions(tmp_path, values, texts):
    path = write(tmp_path / "a.parquet", {"image": [png(0), png(1)], "sentences": values})
    source = open_pairs(path)
    assert [source.captions(i).texts for i in range(2)] == texts
    inputs = open_inputs(path, "text")
    read = []
    for row in range(len(inputs)):
        try:
            read.append(inputs.read(row))
        except PairError as error:
            read.append(str(error))
    assert [t for t in read if ":" not in t] == [text for found in texts for text in found]
    assert len(inputs) == sum(len(found) for found in texts) + (2 if "" in values[0] else 0)


@pytest.mark.parametrize("pattern", ["{0}/d/*.parquet", "{0}/d", "{0}", "{0}/d/{{0..2}}.parquet", "{0}/**/?.parquet"])
def test_many_files(tmp_path, pattern):
    """Ids and names come again in every file and row group."""
    for file in range(3):
        images = [{"bytes": png(5 * file + i), "path": "0.png"} for i in range(5)]
        write(tmp_path / "d" / f"{file}.parquet", {"image": images, "text": CAPTIONS, "id": [0, 1, 0, 1, 0]})
    place = pattern.format(tmp_path)
    source = open_pairs(place)
    assert contents(source) == [(png(5 * f + i), (f"caption {i}",)) for f in range(3) for i in range(5)]
    assert [source.key(i) for i in (0, 4, 5)] == ["0.parquet/0", "0.parquet/4", "1.parquet/0"]
    assert list(source.groups) == [2, 2, 1] * 3
    inputs = open_inputs(place)
    assert [inputs.read(i) for i in range(15)] == [png(i) for i in range(15)]
    assert len({inputs.name(i) for i in range(15)}) == 15


def test_files_of_one_name_in_two_folders(tmp_path):
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(png(number))
        write(tmp_path / folder / "0.parquet", {"path": ["x.png"], "caption": [f"caption {number}"]})
    place = "::".join(str(tmp_path / folder / "0.parquet") for folder in "ab")
    source = open_pairs(place)
    assert contents(source) == EXPECTED[:2]
    assert [source.key(i) for i in range(2)] == [str(tmp_path / folder / "x.png") for folder in "ab"]
    inputs = open_inputs(place)
    assert [inputs.name(i) for i in range(2)] == [str(tmp_path / folder / "x.png") for folder in "ab"]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"image": [png(0)]}, {}, r"column: got image in .*a\.parquet, expected one of title, caption"),
        ({"caption": ["a"]}, {}, r"column: got caption in .*, expected one of filepath, image"),
        ({"image": [png(0)], "caption": [3]}, {}, "got 'caption' of int64 .* expected strings or lists of strings"),
        ({"image": [3], "caption": ["a"]}, {}, "got 'image' of int64 .* expected strings"),
        ({"image": [{"x": 1}], "caption": ["a"]}, {}, "got 'image' of struct"),
        ({"image": [png(0)], "caption": ["a"]}, {"image_column": "b"}, "got image, caption in .* expected 'b'"),
        (
            {"image": ["https://a/b.jpg"], "caption": ["a"]},
            {},
            "got URLs such as 'https://a/b.jpg' in the column 'image'",
        ),
        (
            {"image": pyarrow.array([], pyarrow.binary()), "caption": pyarrow.array([], pyarrow.string())},
            {},
            "got no rows",
        ),
    ],
)
def test_columns_that_do_not_fit(tmp_path, columns, options, message):
    with pytest.raises(ValueError, match=message):
        open_pairs(write(tmp_path / "a.parquet", columns), DataOptions(**options))


def test_files_that_do_not_fit(tmp_path):
    path = write(tmp_path / "0.parquet", {"image": [png(0)] * 4, "caption": ["a", None, "", "b"]})
    write(tmp_path / "1.parquet", {"image": [png(0)], "text": ["a"]})
    with pytest.raises(ValueError, match=r"1\.parquet, expected 'caption'"):
        open_pairs(tmp_path)
    (tmp_path / "1.parquet").write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"1\.parquet: got no whole Parquet file"):
        open_pairs(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"1 of 3 Parquet files are missing, the first is .*2\.parquet"):
        open_pairs(tmp_path / "{0..2}.parquet")
    source = open_pairs(path)
    with pytest.raises(PairError, match=r"0\.parquet/1: caption: got null"):
        source.read(1)
    assert source.read(2).caption == ""
    assert source.read(3).caption == "b"
    # bytes in the middle of a file that are not what was written
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    source = open_pairs(path)
    with pytest.raises(PairError, match=r"0\.parquet: row group 0 cannot be read"):
        source.read(0)
    assert source.read(3).caption == "b"
    # rewritten meanwhile: read anew, unless the rows are others
    write(path, {"image": [png(1)] * 4, "caption": ["a"] * 4})
    assert pickle.loads(pickle.dumps(source)).read(3)[1:3] == (png(1), "a")
    write(path, {"image": [png(0)] * 5, "caption": ["a"] * 5})
    with pytest.raises(PairError, match="changed since its rows were counted"):
        pickle.loads(pickle.dumps(source)).read(3)


def test_without_pyarrow(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", {"image": [png(0)], "caption": ["a"]})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"Parquet needs pyarrow.*: pip install 'clipfast\[embed\]'"):
        open_pairs(path)
    # pictures beside Parquet that says where they came from
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "0.txt").write_text("a")
    assert open_pairs(tmp_path).read(0)[1:3] == (png(0), "a")


def test_what_is_shuffled_together_fits_into_memory(tmp_path, monkeypatch):
    """Every row group is read once an epoch, though all rows are asked for one by one."""
    for file in range(6):
        write(
            tmp_path / f"{file}.parquet",
            {"image": [png(20 * file + i) for i in range(20)], "caption": [f"{i}" for i in range(20)]},
            rows=5,
        )
    whole = open_pairs(tmp_path)
    assert whole.together is None
    size = int(whole._rows._places[:, 3].sum())
    monkeypatch.setattr(parquet_rows, "_HELD", size // 3)
    source = open_pairs(tmp_path)
    assert 5 <= source.together <= 20
    read = []
    plain = parquet_rows.ParquetRows._read
    monkeypatch.setattr(parquet_rows.ParquetRows, "_read", lambda rows, group: read.append(group) or plain(rows, group))

    def batches(first: int = 0, last: int = 30, rank: int = 0, world: int = 1) -> list:
        transform, tokenizer = image_transform(8, train=True), Tokenizer(context_length=8)
        shares = Shares(8, rank, world)
        return list(training_batches(source, transform, tokenizer, shares, seed=1, first_step=first, last_step=last))

    some = batches()
    assert 2 * 24 - 3 <= len(read) <= 2 * 24  # epochs and row groups; the last of one may be the first of the next
    assert sorted(read[:24]) == list(range(24))
    assert read[:24] != list(range(24))
    again = batches(first=11)
    assert all(
        torch.equal(a.images, b.images) and torch.equal(a.tokens, b.tokens)
        for a, b in zip(some[11:], again, strict=True)
    )
    parts = [batches(0, 4, rank, 2) for rank in range(2)]
    joined = [torch.cat([a.images, b.images]) for a, b in zip(*parts, strict=True)]
    assert all(torch.equal(a.images, b) for a, b in zip(some[:4], joined, strict=True))
