"""``clipfast tune`` on the command line: what it is given, what it says, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from clipfast.cli import app
from clipfast.tuning import run as tuning
from clipfast.tuning.decide import Verdict
from clipfast.tuning.run import Line, Report

CHANGED = Line(
    "encoder",
    "float32, width ≤ 1024, inference",
    Verdict("torch", "native", 1.21, 21, "21% faster in 21 rounds"),
    {"native": 0.121, "torch": 0.1},
    ("image tower",),
)
SAME = Line("attention", "float32, packed", Verdict("torch", "torch", 1.0, 5, "reference: 3% slower"), {}, ("a",))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Put a report in the place of measurements; what was asked for, and what the report is to say."""
    known: dict[str, Any] = {"report": {}}

    def tune(models: Any, **more: Any) -> Report:
        known.update(models=models, **more)
        more["progress"](1, 2, "attention")
        report = Report(torch.device("cpu"), ("ViT-B-32 fp32",), [CHANGED, SAME], path=tmp_path / "tuned.json")
        for name, value in known["report"].items():
            setattr(report, name, value)
        return report

    monkeypatch.setattr(tuning, "tune", tune)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return known


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_models_as_the_manual_writes_them(asked: dict[str, Any]) -> None:
    assert run("--model", "ViT-B-32", "ViT-L-14", "--precision", "fp32,bf16", "--device", "cpu").exit_code == 0
    assert asked["models"] == ["ViT-B-32", "ViT-L-14"]
    assert asked["precisions"] == ["fp32", "bf16"]
    assert asked["device"] == "cpu"
    assert run("--model", "ViT-B-32", "--model", "ViT-L-14").exit_code == 0
    assert asked["models"] == ["ViT-B-32", "ViT-L-14"]
    assert run().exit_code == 0
    assert (asked["models"], asked["precisions"], asked["device"], asked["output"]) == (None, None, None, None)
    run("--output", "mine.json", "--seconds", "5")
    assert (asked["output"], asked["seconds"]) == (Path("mine.json"), 5)


def test_a_file_that_cannot_be_is_refused_before_anything_is_measured(asked: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output in ("file/mine.json", "."):
        done = run("--output", output)
        assert done.exit_code == 2
        assert done.stderr.startswith(f"error: output: got {output.partition('/')[0]}")
    assert asked == {"report": {}}


def test_it_says_what_changes_and_why(asked: dict[str, Any], tmp_path: Path) -> None:
    said = run().output
    for words in (
        "what changes",
        "float32, width ≤ 1024, inference",
        "native, 121 ms",
        "torch, 100 ms",
        "21% faster in 21 rounds",
        "what stays as the rule has it",
        "reference: 3% slower",
        "1 of 2 kinds of calls change",
        "tuned.json",
    ):
        assert words in said, words


@pytest.mark.parametrize(
    ("report", "status", "words"),
    [
        ({}, 0, "wrote"),
        ({"wrong": ["attention (triton) computes wrong results: ..."]}, 1, "wrong: attention (triton)"),
        ({"path": None, "not_written": "/home: Read-only file system"}, 1, "CLIPFAST_TUNED=FILE"),
        ({"path": None, "not_written": "/home: Read-only file system"}, 1, "what changes"),
        ({"interrupted": True}, 130, "interrupted"),
        ({"left_out": 3}, 0, "no time was left for 3 calls"),
    ],
)
def test_how_it_ends(asked: dict[str, Any], report: dict[str, Any], status: int, words: str) -> None:
    asked["report"] = report
    result = run()
    assert result.exit_code == status
    assert words in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "ViT-B-23"), "ViT-B-32"),
        (("--precision", "fp8"), "error: tune(precisions): got 'fp8'"),
        (("--device", "tpu"), "error: "),
        (("--seconds", "-1"), "error: tune(seconds): got -1"),
        (("--output", "precious.json"), "precious.json is there and is no tuned file"),
    ],
)
def test_mistakes_are_told_without_a_traceback(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("precious.json").write_text("{}")
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert Path("precious.json").read_text() == "{}"


def test_share_writes_a_record(asked: dict[str, Any], tmp_path: Path) -> None:
    result = run("--share")
    assert result.exit_code == 0
    (record,) = (p for p in tmp_path.glob("*.json"))
    assert str(record.name) in result.output
    assert json.loads(record.read_text(encoding="utf-8"))["lines"][0]["op"] == "encoder"
    # in a clone, where it belongs
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    run("--share")
    assert len(list((tmp_path / "benchmarks" / "results").glob("*/tuned/*.json"))) == 1


def test_share_prints_what_it_cannot_write(
    asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipfast.tuning import records

    def no_folder(path: Path, record: dict) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(records, "write_record", no_folder)
    result = run("--share")
    assert result.exit_code == 0
    record = json.loads(result.stdout.strip().splitlines()[-1])
    assert record["lines"][0]["backend"] == "torch"
    asked["report"] = {"lines": []}
    assert "nothing to share" in run("--share").output


def test_help_does_not_wait_for_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from typer.testing import CliRunner; from clipfast.cli import app;"
        "out = CliRunner().invoke(app, ['tune', '--help']).output;"
        "assert 'Exits' in out, out; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
