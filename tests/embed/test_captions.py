"""Captions that features keep, from every kind of source that has them, and files that were written without."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import small

from clipfast.data.options import DataOptions
from clipfast.data.shards import write_shards
from clipfast.data.sources import open_pairs
from clipfast.embed import embed as embedding
from clipfast.embed.embed import embed
from clipfast.embed.search import encode_query, search


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def folder(tmp_path):
    paths = small.write_pictures(tmp_path / "pictures", 4)
    paths[1].with_suffix(".txt").write_text("one\n\ntwo")
    return tmp_path / "pictures"


CAPTIONS = ["a red thing, number 0", "one\ntwo", "a blue thing, number 2", "a grey thing, number 3"]


def found(source, output, **options) -> dict[int, str | None]:
    """Embed, search for anything, and return the captions by row."""
    model = small.model()
    embed(model, source, output, **options)
    return {hit.row: hit.caption for hit in search(output, encode_query(model, text="a"), k=99)}


def sources(folder) -> dict[str, object]:
    """Write the same pairs in every form."""
    place = folder.parent
    pairs = open_pairs(folder)
    write_shards((pairs.read(i) for i in range(len(pairs))), place / "shards", shard_size=3)
    names = [f"pictures/{i:02d}.png" for i in range(4)]
    with (place / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("filepath", "title"), *zip(names, CAPTIONS, strict=True)])
    listed = [caption.split("\n") for caption in CAPTIONS]
    parquet.write_table(pyarrow.table({"path": names, "caption": listed}), place / "table.parquet")
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, "caption": line} for i, lines in enumerate(listed) for line in lines]
    (place / "captions_x.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return {
        "folder": folder,
        "shards": f"{place}/shards",
        "csv": place / "table.csv",
        "parquet": place / "table.parquet",
        "coco": place / "captions_x.json",
    }


@pytest.mark.parametrize("kind", ["folder", "shards", "csv", "parquet", "coco"])
def test_pictures_keep_their_captions(folder, kind):
    assert found(sources(folder)[kind], folder.parent / "f.parquet") == dict(enumerate(CAPTIONS))


def test_texts_of_a_folder_are_shown_by_their_words(folder):
    """Their name is a place; texts that are called by themselves need nothing beside."""
    expected = ["a red thing, number 0", "one", "two", *CAPTIONS[2:]]
    assert found(folder, folder.parent / "f.npy", kind="text") == dict(enumerate(expected))
    (folder.parent / "list.txt").write_text("a\nb")
    assert found(folder.parent / "list.txt", folder.parent / "g.npy", kind="text") == {0: None, 1: None}


@pytest.mark.parametrize("output", ["f.npy", "f.parquet"])
def test_without_captions_files_are_as_before(folder, output):
    for path in folder.glob("*.txt"):
        path.unlink()
    assert set(found(folder, folder.parent / output).values()) == {None}
    if output == "f.npy":
        lines = (folder.parent / "f.npy.names.jsonl").read_text().splitlines()[1:]
        assert list(map(json.loads, lines)) == [[i, f"{i:02d}.png"] for i in range(4)]
    else:
        assert parquet.read_schema(folder.parent / output).names == ["row", "path", "features"]


def test_what_cannot_be_read_of_captions_leaves_the_picture(folder):
    (folder / "00.txt").write_bytes(b"caf\xe9")
    (folder / "02.txt").unlink()
    (folder / "02.json").write_text('{"width": 3}')
    (folder / "03.txt").unlink()
    (folder / "03.json").write_text('{"caption": ["three", "3"]}')
    assert found(folder, folder.parent / "f.npy") == {0: None, 1: "one\ntwo", 2: None, 3: "three\n3"}
    latin = found(folder, folder.parent / "g.npy", options=DataOptions(encoding="latin-1"))
    assert latin[0] == "café"


@pytest.mark.parametrize("output", ["f.npy", "f.parquet"])
def test_parts_of_an_earlier_version_are_taken_over(folder, output, monkeypatch):
    """They have no captions; the features are the same, and the rest of the run has captions."""
    options = {"batch_size": 2, "batches_per_part": 1}
    embed(small.model(), folder, folder.parent / f"whole_{output}", **options)
    write = embedding.PartStore.write

    def stopping(store, rows, part):
        if rows.start:
            raise KeyboardInterrupt
        write(store, rows, part)

    monkeypatch.setattr(embedding.PartStore, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        embed(small.model(), folder, folder.parent / output, **options)
    monkeypatch.undo()
    (part,) = (folder.parent / f"{output}.parts").glob("*.npz")
    with np.load(part) as kept:
        values = dict(kept)
    about = json.loads(values["about"].tobytes())
    assert about.pop("captions") == CAPTIONS[:2]
    np.savez(part, **values | {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)})
    assert found(folder, folder.parent / output, **options) == {0: None, 1: None, 2: CAPTIONS[2], 3: CAPTIONS[3]}
    if output == "f.npy":
        assert (folder.parent / output).read_bytes() == (folder.parent / f"whole_{output}").read_bytes()


def test_lists_of_captions_in_other_programs_tables(tmp_path):
    features = list(np.eye(3, 16, dtype=np.float32))
    table = pyarrow.table({"features": features, "caption": [["a", "b"], None, ["c"]]})
    parquet.write_table(table, tmp_path / "f.parquet")
    hits = search(tmp_path / "f.parquet", encode_query(small.model(), text="a"), k=3)
    assert {hit.row: hit.caption for hit in hits} == {0: "a\nb", 1: None, 2: "c"}
