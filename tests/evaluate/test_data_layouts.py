"""Retrieval on data sets as they come: the pictures and texts that clip-benchmark makes of them."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest
import small
import torch
from samples import write_tar
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.data.model_inputs import picture_loader
from clipfast.data.options import DataOptions
from clipfast.evaluate.run import Reading, evaluate


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def captions(number: int) -> list[str]:
    return [f"a {small.WORDS[(number + j) % 8]} thing, number {5 * number + j}" for j in range(5)]


@pytest.fixture
def shards(tmp_path):
    """Six pictures with five captions each, in clip-benchmark's layout: keys and names of shards begin anew."""
    paths = small.write_pictures(tmp_path / "pictures", 6)
    for shard in range(2):
        members = []
        for i in range(3):
            members += [(f"s{i:07d}.png", paths[3 * shard + i].read_bytes())]
            members += [(f"s{i:07d}.txt", "\n".join(captions(3 * shard + i)).encode())]
        write_tar(tmp_path / "wds" / "test" / f"{shard}.tar", members)
    (tmp_path / "wds" / "test" / "nshards.txt").write_text("2")
    (tmp_path / "wds" / "dataset_type.txt").write_text("retrieval")
    return tmp_path / "wds" / "test"


def test_it_is_clip_benchmarks(shards, monkeypatch):
    # it downloads with this, which nothing here does
    monkeypatch.setitem(sys.modules, "requests", ModuleType("requests"))
    from clip_benchmark.datasets.builder import build_wds_dataset
    from clip_benchmark.metrics import zeroshot_retrieval

    model = small.model()
    ours = evaluate(model, shards, reading=Reading(batch_size=4))
    assert ours.counts == {"pictures": 6, "texts": 30}
    data = build_wds_dataset("mine", picture_loader(model), split="test", data_dir=str(shards.parent))
    batches = [(torch.stack(list(images)), list(texts)) for images, texts in data.batched(4)]
    theirs = zeroshot_retrieval.evaluate(
        model, batches, lambda texts: clipfast.tokenize(texts, 16), "cpu", amp=False, recall_k_list=[1, 5]
    )
    for k in (1, 5):
        assert ours.metrics[f"text_to_image_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours.metrics[f"image_to_text_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    assert 0 < ours.metrics["image_to_text_r5"] < 1


def test_every_layout_gives_the_same(shards, tmp_path):
    """Shards in two folders, a folder, Flickr's list, a table, COCO's JSON and Parquet."""
    import pyarrow
    import pyarrow.parquet as parquet

    model = small.model()
    expected = evaluate(model, shards)
    pictures = tmp_path / "pictures"
    for shard, folder in enumerate(("x", "y")):
        (tmp_path / folder).mkdir()
        (shards / f"{shard}.tar").rename(tmp_path / folder / "0.tar")
    rows = [(f"{i:02d}.png", text) for i in range(6) for text in captions(i)]
    (pictures / "list.token").write_text("".join(f"{name}#{i % 5}\t{text}\n" for i, (name, text) in enumerate(rows)))
    (pictures / "t.csv").write_text("photo;words\n" + "".join(f'{name};"{text}"\n' for name, text in rows))
    images = [{"id": i, "file_name": f"{i:02d}.png"} for i in range(6)]
    found = [{"image_id": i // 5, "caption": text} for i, (_, text) in enumerate(rows)]
    (pictures / "captions_val.json").write_text(json.dumps({"images": images, "annotations": found}))
    data = [{"bytes": (pictures / f"{i:02d}.png").read_bytes(), "path": "x.png"} for i in range(6)]
    table = pyarrow.table({"image": data, "caption": [captions(i) for i in range(6)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    for place, options in (
        (f"{tmp_path}/{{x,y}}/0.tar", None),
        (pictures / "list.token", None),
        (pictures / "t.csv", DataOptions(image_column="photo", caption_column="words")),
        (pictures / "captions_val.json", None),
        (tmp_path / "a.parquet", None),
    ):
        result = evaluate(model, place, options=options)
        assert (result.metrics, result.counts, result.skipped) == (expected.metrics, expected.counts, {}), place
    for name in ("list.token", "t.csv", "captions_val.json"):
        (pictures / name).unlink()
    for i in range(6):
        (pictures / f"{i:02d}.txt").write_text("\r\n".join(captions(i)) + "\r\n\r\n")
    assert evaluate(model, pictures).metrics == expected.metrics


def test_losses_are_named(tmp_path):
    small.write_pictures(tmp_path / "p", 4)
    members = []
    for i, value in enumerate((None, ["one", None, 3], 5, "four")):
        members += [(f"{i}.png", (tmp_path / "p" / f"{i:02d}.png").read_bytes())]
        members += [(f"{i}.json", json.dumps({"alt": value}).encode())]
    members += [("3.png", b"no picture"), ("3.json", b'{"alt": "five"}')]
    write_tar(tmp_path / "0.tar", members)
    folder = small.run(tmp_path / "model")
    command = [
        "eval",
        str(folder),
        "--data",
        str(tmp_path / "0.tar"),
        "--caption-key",
        "alt",
        "--device",
        "cpu",
        "--json",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["counts"] == {"pictures": 2, "texts": 2}
    assert list(result["skipped"]) == ["0.tar/0", "0.tar/2", "0.tar/3#2", "0.tar/1, alt 2", "0.tar/1, alt 3"]
    done = CliRunner().invoke(app, [*command, "--image-key", " "])
    assert done.exit_code == 2
    assert "error: image_key: got ' ', expected a name" in done.output
