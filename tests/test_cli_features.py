from __future__ import annotations

import csv
import json
import re
import sys

import pytest
import small
import torch
from typer.testing import CliRunner

from clipfast.cli import app


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a run and pictures, which is the working folder."""
    monkeypatch.chdir(tmp_path)
    small.run(tmp_path / "run")
    small.write_pictures(tmp_path / "pictures", 6)
    return tmp_path


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("task", ["retrieval", "zero-shot", "linear-probe"])
def test_measures_have_identifiers_in_json_and_csv(here, task):
    for index in range(12):
        small.write_pictures(here / "classes" / small.WORDS[index % 6] / str(index), 1)
    data = {
        "retrieval": ["pictures"],
        "zero-shot": ["classes", "--templates", "photo"],
        "linear-probe": ["classes", "--C", "1"],
    }
    arguments = ("eval", "run", "--task", task, "--data", *data[task])
    shown = run(*arguments, "--output", "r.csv", "--json")
    assert shown.exit_code == 0, shown.output
    printed = json.loads(shown.stdout)
    names = {"retrieval": "text_to_image_r10", "zero-shot": "top5", "linear-probe": "mean_per_class_recall"}
    assert names[task] in printed["metrics"]
    with (here / "r.csv").open(newline="", encoding="utf-8") as file:
        (row,) = csv.DictReader(file)
    assert all(name.isidentifier() for name in row)
    for name, value in (printed["metrics"] | printed["counts"]).items():
        assert float(row[name]) == value
    assert (row["model"], row["task"], row["skipped"]) == ("run", task, "0")


def test_eval_as_a_table_and_as_json(here):
    shown = run("eval", "run", "--data", "pictures", "--output", "r.json")
    assert shown.exit_code == 0, shown.output
    assert "text → image recall@5" in shown.stdout
    printed = json.loads(run("eval", "run", "--data", "pictures", "--json").stdout)
    assert printed == json.loads((here / "r.json").read_text())
    assert printed["task"] == "retrieval"
    assert printed["counts"] == {"pictures": 6, "texts": 6}


def test_eval_in_half_precision_and_as_a_probe(here):
    zero_shot = run("eval", "run", "--data", "digits", "--precision", "bf16", "--templates", "photo", "--json")
    assert json.loads(zero_shot.stdout)["counts"] == {"pictures": 1797, "classes": 10}
    probe = run("eval", "run", "--data", "digits", "--task", "linear-probe", "--C", "1", "--json")
    # features of drawn weights know digits far better than chance
    assert json.loads(probe.stdout)["metrics"]["top1"] > 0.25


@pytest.mark.parametrize("output", ["f.npy", "f.parquet"])
def test_what_is_embedded_is_found(here, output, monkeypatch):
    (here / "pictures" / "03.png").write_bytes(b"no picture")
    done = run("embed", "run", "pictures", output, "--batch-size", "2")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"wrote {output}: 5 rows\n"
    assert "skipped 1 that cannot be read:\n  03.png: ImageError" in done.stderr
    again = run("embed", "run", "pictures", output, "--batch-size", "2")
    assert again.stdout == f"{output} is complete: 5 rows\n"
    # from another folder too: the file says where its model lies
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    found = run("search", f"../{output}", "--image", "../pictures/04.png", "--json", "-k", "3")
    hits = json.loads(found.stdout)["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3]
    assert (hits[0]["name"], hits[0]["row"]) == ("04.png", 4)
    assert hits[0]["cosine"] == pytest.approx(1, abs=1e-5)
    table = run("search", f"../{output}", "a red thing", "--nearest", "2").stdout
    assert "a red thing" in table
    assert table.count(".png") == 2


@pytest.mark.parametrize("output", ["f.npy", "f.parquet"])
def test_several_words_are_one_text_and_hits_have_captions(here, output):
    (here / "pictures" / "02.txt").write_text("first\nsecond\nthird")
    (here / "pictures" / "03.txt").unlink()
    assert run("embed", "run", "pictures", output).exit_code == 0
    unquoted = run("search", output, "a", "red", "thing", "-k", "6", "--json", "--output", "hits.csv")
    found = json.loads(unquoted.stdout)
    assert found == json.loads(run("search", output, "a red thing", "-k", "6", "--json").stdout)
    assert found["query"] == "a red thing"
    captions = {hit["name"]: hit.get("caption") for hit in found["hits"]}
    assert captions["02.png"] == "first\nsecond\nthird"
    assert captions["03.png"] is None
    assert captions["05.png"] == "a black thing, number 5"
    with (here / "hits.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [hit["name"] for hit in found["hits"]]
    assert {row["name"]: row["caption"] or None for row in rows} == captions
    table = run("search", output, "a", "red", "thing").stdout
    assert "first (and 2 more)" in table
    assert "a black thing, number 5" in table
    assert "cosine: says what is nearest, not that it fits" in table
    assert "the nearest need not be near" in run("search", output, "--image", "pictures/00.png").stdout


def test_a_picture_is_no_word(here):
    run("embed", "run", "pictures", "f.npy")
    (here / "my pictures").mkdir()
    (here / "my pictures" / "a.png").touch()
    (here / "cat").touch()
    for words in (("pictures/00.png",), ("my", "pictures/a.png")):
        told = run("search", "f.npy", *words)
        assert (told.exit_code, told.stdout) == (2, "")
        name = " ".join(words)
        assert f"query: got {name}, which is a picture's file, expected words; --image {name}" in told.stderr
    # other files' names are words, and so is what is no file
    assert run("search", "f.npy", "cat").exit_code == run("search", "f.npy", "nothing.png").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("eval", "none", "--data", "none", "--output", "r.xlsx"),
            "got r.xlsx, expected a name that ends with .json or",
        ),
        (("eval", "none", "--data", "none", "--output", "pictures.json"), "got pictures.json, which is a folder"),
        (("eval", "none", "--data", "none", "--output", "list/r.csv"), "got list, expected a folder: "),
        (("search", "none.npy", "a", "--output", "hits"), "got hits, expected a name that ends with .json or .csv"),
        (("search", "none.npy", "a", "--output", "list/r.csv"), "got list, expected a folder: "),
        (("embed", "none", "none", "f.csv"), "got f.csv, expected a name that ends with .parquet or .npy"),
        (("embed", "none", "none", "list/below/f.npy"), "got list/below, expected a folder: "),
        (("embed", "none", "none", "pictures.npy"), "got pictures.npy, which is a folder"),
        (("show", "none", "none.png", "--output", "list"), "got list, expected a folder: "),
    ],
)
def test_outputs_are_looked_at_before_anything_is_read(tmp_path, monkeypatch, arguments, message):
    """There is no model and no data: what is said first is said before they are opened."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list").touch()
    for name in ("pictures.json", "pictures.npy"):
        (tmp_path / name).mkdir()
    before = sorted(tmp_path.rglob("*"))
    told = run(*arguments)
    assert told.exit_code == 2
    assert f"error: output: {message}" in told.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_wrong_with_a_search_is_told_before_the_model_is_opened(here):
    run("embed", "run", "pictures", "f.npy")
    assert "error: k: got 0" in run("search", "f.npy", "a", "-k", "0", "--model", "none").stderr
    assert "error: features: got none.npy" in run("search", "none.npy", "a", "--model", "none").stderr


def test_a_tower_alone_is_named_in_few_lines(here):
    state = {k: v for k, v in small.model().state_dict().items() if k.startswith("visual.")}
    torch.save(state, "tower.pt")
    told = run("eval", "run", "--weights", "tower.pt", "--data", "pictures")
    assert told.exit_code == 2
    assert "They are an image tower alone" in told.stderr
    assert "… and " in told.stderr
    assert len(told.stderr) < 1500


@pytest.mark.parametrize("command", ["eval", "embed", "search", "show"])
def test_help_has_groups_and_marks_what_is_required(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = run(command, "-h").stdout
    groups = re.findall(r"^╭─ (.+?) ─", said, re.MULTILINE)
    assert {"Model", "Output", "Speed and memory"} <= set(groups)
    panels = dict(zip(groups, re.split(r"^╭─.*$", said, flags=re.MULTILINE)[1:], strict=True))
    # beside help there are three options at most that belong to no group
    assert panels["Options"].count("--") <= 3
    wanted = {
        "eval": ["model", "--data"],
        "embed": ["model", "source", "output"],
        "show": ["model", "images", "--output"],
    }
    marked = re.findall(r"^│ \*\s+(\S+?)(?:\.\.\.)?\s", said, re.MULTILINE)
    assert marked == wanted.get(command, ["features"])
    if command == "search":
        assert "[required, or --image]" in said
        assert "[required, or WORDS]" in said


def test_show(here):
    done = run("show", "run", "pictures/00.png", "pictures/01.png", "--text", "a red thing", "--output", "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "out/report.html"
    assert all((here / line).is_file() for line in done.stdout.splitlines())
    page = (here / "out" / "report.html").read_text()
    assert "<td>model</td><td>run</td>" in page
    assert "<td>random weights, never trained (SHA-256 " in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "no.pt", "--data", "pictures"), "model: got no.pt"),
        (("eval", "ViT-B-32", "--data", "pictures"), "weights: got none for ViT-B-32"),
        (("eval", "run", "--data", "nowhere"), "nowhere"),
        (("eval", "run", "--data", "pictures", "--task", "both"), "task: got 'both'"),
        (("eval", "run", "--data", "pictures", "--precision", "fp8"), "precision: got 'fp8'"),
        (("eval", "run", "--data", "pictures", "--device", "tpu"), "device: got 'tpu'"),
        (("eval", "run", "--data", "pictures", "--classes", "no.txt"), "class_names: got one for retrieval"),
        (("eval", "run", "--data", "digits", "--classes", "no.txt"), "error: no.txt: no such file or directory\n"),
        (("embed", "run", "nowhere", "f.npy"), "source: got nowhere"),
        (("embed", "run", "pictures", "f.csv"), "output: got f.csv"),
        (("embed", "run", "pictures", "run/model.json/f.npy"), "model.json"),
        (("embed", "run", "pictures", "f.npy", "--kind", "sound"), "kind: got 'sound'"),
        (("search", "no.npy", "a"), "features: got no.npy"),
        (("search", "no.npy"), "got neither, expected one of them"),
        (("search", "no.npy", "a", "--image", "b.png"), "got both, expected one of them"),
        (("search", "cut.parquet", "a"), "cut.parquet: got no whole Parquet file"),
        (("show", "run", "no.png", "--output", "out"), "no.png"),
    ],
)
def test_mistakes_are_told_in_one_line(here, arguments, message):
    (here / "cut.parquet").write_bytes(b"PAR1")
    before = sorted(here.rglob("*"))
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not result.stdout
    assert sorted(here.rglob("*")) == before


def test_without_pyarrow(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (here / "g.parquet").touch()
    for arguments in (("embed", "run", "pictures", "f.parquet"), ("search", "g.parquet", "a")):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr == "error: Parquet needs pyarrow, which is not installed: pip install 'clipfast[embed]'\n"
    assert run("embed", "run", "pictures", "f.npy").exit_code == 0
