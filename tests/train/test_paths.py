"""Where paths among the settings of a run start from: the TOML file's folder, or the working folder."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from train_runs import make_place
from typer.testing import CliRunner

from clipfast.cli import app
from clipfast.data.patterns import expand_pattern
from clipfast.train.config import RunConfig, make_run_config, read_settings
from clipfast.train.paths import PATHS, shown, start_from


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("name", ["data", "val_data", "output", "weights", "tokenizer", "distill_weights", "resume"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("shards", "/conf/shards"),
        ("./shards/", "/conf/shards"),
        ("../shards/train", "/shards/train"),
        ("../a b/é", "/a b/é"),
        ("/data/shards", "/data/shards"),
        ("~/shards", "/home/me/shards"),
    ],
)
def test_paths_start_from_the_folder(name: str, value: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert start_from({name: value}, "/conf") == {name: expected}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("../s/train-{000..123}.tar", "/s/train-{000..123}.tar"),
        ("{a,b}/*.tar", "/conf/{a,b}/*.tar"),
        ("a-{0..3}.tar::../b.tar::/c.tar", "/conf/a-{0..3}.tar::/b.tar::/c.tar"),
        ("a.tar::s3://bucket/b.tar", "/conf/a.tar::s3://bucket/b.tar"),
        ("s3://bucket/{00..10}.tar", "s3://bucket/{00..10}.tar"),
        ("https://host/a.tar", "https://host/a.tar"),
        ("pipe:aws s3 cp s3://a/b.tar -", "pipe:aws s3 cp s3://a/b.tar -"),
        ("{/a,/b}/{0..3}.tar", "{/a,/b}/{0..3}.tar"),
        ("emoji", "emoji"),
        ("scikit-image", "scikit-image"),
    ],
)
def test_patterns_addresses_and_names_of_data(value: str, expected: str) -> None:
    for name in ("data", "val_data"):
        assert start_from({name: value}, "/conf") == {name: expected}


@pytest.mark.parametrize("name", ["output", "weights", "tokenizer", "distill_weights", "resume"])
@pytest.mark.parametrize("value", ["runs/a::b", "{a,b}", "pipe:a"])
def test_only_data_is_a_pattern(name: str, value: str) -> None:
    assert start_from({name: value}, "/conf") == {name: f"/conf/{value}"}


@pytest.mark.parametrize("name", ["model", "distill_model"])
def test_names_of_models_are_no_paths(name: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "ViT-B-32").mkdir()
    for value, expected in {
        "ViT-B-32": "ViT-B-32",
        # a slip is told by the names that are near, not by a path
        "ViT-B-23": "ViT-B-23",
        "hf-hub:timm/ViT-B-16-SigLIP": "hf-hub:timm/ViT-B-16-SigLIP",
        "mine": f"{tmp_path}/mine",
        "small.json": f"{tmp_path}/small.json",
        "../runs/a": f"{tmp_path.parent}/runs/a",
    }.items():
        assert start_from({name: value}, tmp_path) == {name: expected}


def test_what_is_no_path_stays(tmp_path: Path) -> None:
    values = {
        "resume": "auto",
        "steps": 3,
        "weights": None,
        "caption_key": "txt",
        "device": "cpu",
        "data": 7,
        "output": "",
    }
    assert start_from(values, tmp_path) == values
    assert start_from({"resume": "never"}, tmp_path) == {"resume": "never"}
    # what lies there goes before a name
    (tmp_path / "emoji").mkdir()
    assert start_from({"data": "emoji"}, tmp_path) == {"data": f"{tmp_path}/emoji"}


def test_every_setting_that_is_a_path_is_known() -> None:
    texts = {name for name, field in RunConfig.__dataclass_fields__.items() if "str" in str(field.type)}
    others = {"naflex_max_patches", "device", *(n for n in texts if n.endswith(("_key", "_column")))}
    assert set(PATHS) == texts - others - {"separator", "encoding"}


def test_parents_of_links_and_folders_with_signs_in_their_names(tmp_path: Path) -> None:
    far = tmp_path / "far" / "conf"
    far.mkdir(parents=True)
    (tmp_path / "near").symlink_to(far)
    # the system follows the link first
    place = start_from({"output": "../runs"}, tmp_path / "near")["output"]
    assert os.path.realpath(place) == str(tmp_path / "far" / "runs")
    odd = tmp_path / "a{b}::c*"
    (odd / "s").mkdir(parents=True)
    for name in ("0.tar", "1.tar"):
        (odd / "s" / name).touch()
    data = start_from({"data": "s/{0..1}.tar"}, odd)["data"]
    assert expand_pattern(data) == [str(odd / "s" / "0.tar"), str(odd / "s" / "1.tar")]
    data = start_from({"data": "s/0.tar::s/1.tar"}, odd)["data"]
    assert expand_pattern(data) == [str(odd / "s" / "0.tar"), str(odd / "s" / "1.tar")]


def test_shown_as_it_would_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "runs" / "a") == "runs/a"
    assert shown("runs/a") == "runs/a"
    assert shown(tmp_path) == str(tmp_path)
    assert shown("/elsewhere/a") == "/elsewhere/a"
    assert shown("emoji") == "emoji"


def train(*arguments: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as that a run goes on with other settings
        done = CliRunner().invoke(app, ["train", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_one_toml_file_from_three_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_place(tmp_path)
    (tmp_path / "conf").mkdir()
    settings: dict[str, Any] = {
        "data": "../shards/{00000..00001}.tar::../shards/00002.tar",
        "val_data": "../held_out",
        "model": "../tiny.json",
        "output": "../runs/a",
        **{"steps": 4, "batch_size": 8, "warmup_steps": 0, "schedule": "constant", "workers": 0},
        **{"device": "cpu", "tensorboard": False},
    }
    toml = tmp_path / "conf" / "run.toml"
    toml.write_text("\n".join(f"{name} = {json.dumps(value)}" for name, value in settings.items()))
    (tmp_path / "elsewhere").mkdir()

    monkeypatch.chdir(tmp_path)
    said = train("--config", "conf/run.toml", "--steps", "2", "--keep", "1")
    assert "model: runs/a/model.safetensors" in said
    kept = json.loads((tmp_path / "runs" / "a" / "config.json").read_text())
    assert kept["data"] == f"{tmp_path}/shards/{{00000..00001}}.tar::{tmp_path}/shards/00002.tar"
    assert {name: kept[name] for name in ("val_data", "model", "output")} == {
        "val_data": str(tmp_path / "held_out"),
        "model": str(tmp_path / "tiny.json"),
        "output": str(tmp_path / "runs" / "a"),
    }
    # what is kept serves in another folder, and is the same run
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert make_run_config(kept) == make_run_config({**read_settings(toml), "steps": 2, "keep": 1})
    monkeypatch.chdir(tmp_path / "conf")
    said = train("--config", "run.toml", "--steps", "2")
    assert "going on from step 2" in said
    assert f"model: {tmp_path}/runs/a/model.safetensors" in said
    # a path of the command line starts from the working folder, and goes before the file's
    monkeypatch.chdir(tmp_path / "elsewhere")
    train("--config", "../conf/run.toml", "--output", "mine", "--steps", "1")
    assert (tmp_path / "elsewhere" / "mine" / "model.safetensors").is_file()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a"]


def test_checkpoints_from_before_knew_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings on the command line, relative, are the same run as those of a file, absolute."""
    make_place(tmp_path)
    monkeypatch.chdir(tmp_path)
    common = ["--steps", "1", "--batch-size", "8", "--warmup-steps", "0", "--workers", "0", "--no-tensorboard"]
    train("--data", "shards", "--model", "tiny.json", "--output", "run", "--device", "cpu", *common)
    (tmp_path / "run.toml").write_text('data = "shards"\nmodel = "tiny.json"\noutput = "run"\ndevice = "cpu"\n')
    assert "going on from step 1" in train("--config", "run.toml", *common)
