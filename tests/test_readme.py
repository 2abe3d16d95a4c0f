"""Every code block of the README runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small
from typer.testing import CliRunner

from clipfast.cli import app

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
# what stands behind each command, so that the test of the README does not run the tests of everything
SHORTENED = {
    "make demo": ["make", "demo", "ARGS=--steps 2 --batch-size 16 --output {tmp}/demo"],
    "make test": ["make", "test", "JOBS=0", "ARGS=--collect-only -q tests/ops"],
    "pip install .": [
        *("{root}/.venv/bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
        *("--target", "{tmp}/site", "."),
    ],
    "make wheel": ["make", "--dry-run", "wheel"],
    "make bench": [
        *("sh", "-ec"),
        "make --dry-run bench; "
        "{root}/.venv/bin/pytest benchmarks/test_layer_norm.py --scale smoke --results {tmp}/run.json",
    ],
    "pip install dist/clipfast-*.whl": [
        *("sh", "-ec"),
        "{root}/.venv/bin/python scripts/build_wheel.py --cpu --output {tmp}/dist; "
        "{root}/.venv/bin/python -m pip install --quiet --no-deps --target {tmp}/site {tmp}/dist/clipfast-*.whl",
    ],
    "clipfast doctor": ["{root}/.venv/bin/clipfast", "doctor"],
}
FEATURE_COMMANDS = ("clipfast eval", "clipfast embed", "clipfast search", "clipfast show")
TRAINING_COMMANDS = ("clipfast shards", "torchrun")


def test_blocks_are_of_two_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "console"}
    commands = [line for kind, text in BLOCKS if kind == "console" for line in text.splitlines()]
    commands = [line for line in commands if not line.startswith(FEATURE_COMMANDS + TRAINING_COMMANDS)]
    assert sorted(commands) == sorted(SHORTENED)


@pytest.mark.slow
def test_python_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for kind, text in BLOCKS:
        if kind == "python":
            exec(compile(text, "README.md", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("command", SHORTENED)
def test_commands(command: str, tmp_path: Path, compiled_once: dict[str, str]) -> None:
    if shutil.which("make") is None or not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the commands work on a clone with make and its own .venv")
    arguments = [a.format(root=ROOT, tmp=tmp_path) for a in SHORTENED[command]]
    # `make` has compiled the CUDA half for the environment that this runs in
    environment = os.environ | ({} if command.startswith("make") else {"CLIPFAST_SKIP_CUDA": "1"} | compiled_once)
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    installed = "site/clipfast/kernels/__init__.py"
    expected = {
        "make demo": "demo/report.html",
        "make bench": "run.json",
        "pip install .": installed,
        "pip install dist/clipfast-*.whl": installed,
    }
    assert command not in expected or (tmp_path / expected[command]).is_file()


def block_with(words: str) -> str:
    """Return the block of commands that holds some words."""
    (text,) = (text for kind, text in BLOCKS if kind == "console" and words in text)
    return text


@pytest.mark.slow
def test_training_commands(tmp_path: Path) -> None:
    """As they stand there, one after another, but for the number of steps."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    programs = Path(sys.executable).parent
    for line in block_with("torchrun").splitlines():
        program, *arguments = shlex.split(line)
        if program == "torchrun":
            arguments += ["--steps", "2", "--batch-size", "32", "--val-pairs", "32"]
        command = [sys.executable, "-m", "clipfast"] if program == "clipfast" else [str(programs / program)]
        done = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (line, done.stdout[-3000:], done.stderr[-3000:])
    assert "juggling" in done.stdout
    assert (tmp_path / "runs" / "emoji" / "model.safetensors").is_file()


@pytest.mark.slow
def test_feature_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # as they stand there, one after another, with a model that was drawn in the place of one that was trained
    monkeypatch.chdir(tmp_path)
    small.run(tmp_path / "runs" / "demo")
    small.write_pictures(tmp_path / "pictures", 6)
    lines = [line for line in block_with("clipfast show").splitlines() if line.startswith(FEATURE_COMMANDS)]
    assert {line.split()[1] for line in lines} == {command.split()[1] for command in FEATURE_COMMANDS}
    for line in lines:
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output)
    for made in ("runs/demo/eval.json", "features.parquet", "runs/show/similarity.png", "runs/show/report.html"):
        assert (tmp_path / made).is_file()
