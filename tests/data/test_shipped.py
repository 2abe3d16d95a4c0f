"""Pairs that packages bring, by name: the same sides of the emoji for every command."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
from PIL import Image
from typer.testing import CliRunner

from clipfast.cli import app
from clipfast.data import shipped
from clipfast.data.emoji_pairs import EmojiPairs, write_emoji_folder
from clipfast.data.shipped import is_shipped, open_shipped
from clipfast.data.sources import open_pairs

COUNT, HELD_OUT = 40, (3, 4, 17, 38)


@pytest.fixture(autouse=True)
def sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs in the place of OpenMoji's, in an empty working folder; which sizes were asked for."""
    asked: list[int] = []

    def load(size: int) -> EmojiPairs:
        asked.append(size)
        pictures = np.random.default_rng(0).integers(0, 256, (COUNT, size, size, 3), dtype=np.uint8)
        held_out = np.isin(np.arange(COUNT), HELD_OUT)
        return EmojiPairs(pictures, [f"thing {i}" for i in range(COUNT)], [""] * COUNT, held_out)

    monkeypatch.setattr(shipped, "load_emoji_pairs", load)
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return asked


def test_two_sides_and_no_pair_on_both(sizes: list[int]) -> None:
    learned, measured = open_pairs("emoji", training=True), open_pairs("emoji")
    keys = [[source.key(i) for i in range(len(source))] for source in (learned, measured)]
    assert keys[1] == [f"thing {i}" for i in HELD_OUT]
    assert sorted(keys[0] + keys[1]) == sorted(f"thing {i}" for i in range(COUNT))
    pair = measured.read(1)
    assert (pair.captions, Image.open(io.BytesIO(pair.image)).size) == (("thing 4",), (64, 64))
    assert "OpenMoji" in str(Image.open(io.BytesIO(pair.image)).info["Copyright"])
    assert learned.identity != measured.identity
    # workers get them whole
    assert pickle.loads(pickle.dumps(learned)).read(5) == learned.read(5)


def test_drawn_as_large_as_the_model_reads_them(sizes: list[int]) -> None:
    for size in (32, 224, 336, 4, (96, 128), None):
        open_shipped("emoji", image_size=size)
    assert sizes == [32, 224, 224, 8, 128, 64]


def test_what_is_there_goes_before_a_name() -> None:
    assert is_shipped("emoji")
    assert not is_shipped("emojis")
    small.write_pictures(Path("emoji"), 3)
    assert not is_shipped("emoji")
    assert len(open_pairs("emoji")) == 3


def run(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done


def test_every_command_that_takes_data(sizes: list[int]) -> None:
    """Training sees what is not held out; all others what is."""
    small.run(Path("run"))
    said = run(
        *("train", "--data", "emoji", "--val-data", "emoji", "--model", "run", "--steps", 1, "--batch-size", 4),
        *("--workers", 0, "--device", "cpu", "--no-tensorboard", "--output", "out", "--warmup-steps", 0),
    ).stdout
    assert "data: emoji; output: out\n" in said
    assert f"pairs: {COUNT - len(HELD_OUT)}, " in said
    assert f"val_pairs: {len(HELD_OUT)}\n" in said
    assert json.loads(Path("out/config.json").read_text())["data"] == "emoji"
    found = json.loads(run("eval", "out", "--data", "emoji", "--json").stdout)
    assert found["counts"] == {"pictures": len(HELD_OUT), "texts": len(HELD_OUT)}
    for kind in ("image", "text"):
        assert run("embed", "out", "emoji", f"{kind}.npy", "--kind", kind).stdout.endswith(f": {len(HELD_OUT)} rows\n")
    assert set(sizes) == {small.CONFIG["vision_cfg"]["image_size"]}
    # another data set of no files is not what these rows are of
    other = CliRunner().invoke(app, ["embed", "out", "scikit-image", "image.npy"])
    assert (other.exit_code, "source differ" in other.output) == (2, True), other.output


def test_a_folder_of_what_is_held_out_is_the_same_data(sizes: list[int]) -> None:
    small.run(Path("run"))
    write_emoji_folder(shipped.load_emoji_pairs(32), "folder")
    results = [json.loads(run("eval", "run", "--data", data, "--json").stdout) for data in ("emoji", "folder")]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["counts"] == results[1]["counts"]


def test_shards_of_pairs_that_no_files_hold() -> None:
    assert "wrote 1 of 1 shards to s: 8 pairs" in run("shards", "scikit-image", "s").stdout
    assert "s is complete: 1 shards, 8 pairs" in run("shards", "scikit-image", "s").stdout
    assert len(open_pairs("s")) == 8
