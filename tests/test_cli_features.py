from __future__ import annotations

import json
import sys

import pytest
import small
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


def test_show(here):
    done = run("show", "run", "pictures/00.png", "pictures/01.png", "--text", "a red thing", "--output", "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == "out/report.html"
    assert all((here / line).is_file() for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("eval", "no.pt", "--data", "pictures"), "model: got no.pt"),
        (("eval", "ViT-B-32", "--data", "pictures"), "weights: got none for ViT-B-32"),
        (("eval", "run", "--data", "nowhere"), "nowhere"),
        (("eval", "run", "--data", "pictures", "--task", "both"), "task: got 'both'"),
        (("eval", "run", "--data", "pictures", "--precision", "fp8"), "precision: got 'fp8'"),
        (("eval", "run", "--data", "pictures", "--device", "tpu"), "device: got 'tpu'"),
        (("embed", "run", "nowhere", "f.npy"), "input: got nowhere"),
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
