"""The examples run as their first lines say, each in a process of its own, and what they print is so."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import small

import clipfast

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("not a clone", allow_module_level=True)

PROGRAMS = {"python": [], "torchrun": ["-m", "torch.distributed.run", "--standalone"]}
# read by every Python that starts, the ranks of torchrun too: what conftest.py does for tests
SITE = "import torchvision_on_cpu\n\ntorchvision_on_cpu.enable()\n"
SCRIPTS = ("finetune_open_clip.py", "transformers_pipeline.py", "ddp.py", "onnx_export.py")


def first_command(script: str) -> list[str]:
    """Return the first command that an example's own words give for it."""
    docstring = ast.get_docstring(ast.parse((EXAMPLES / script).read_text(encoding="utf-8")))
    return next(shlex.split(line) for line in docstring.splitlines() if f"examples/{script}" in line)


def run(script: str, folder: Path, *options: object) -> str:
    """Run an example as its own words say, in a folder and with further options; return what it printed."""
    program, *arguments = first_command(script)
    command = [sys.executable, *PROGRAMS[program], *(str(ROOT / a) if "/" in a else a for a in arguments)]
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    path = os.pathsep.join([str(folder / "site"), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    command += map(str, options)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode and "\nModuleNotFoundError" in done.stderr:
        raise ModuleNotFoundError(done.stderr.strip().splitlines()[-1])  # conftest.py skips it where that was asked for
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def numbers(pattern: str, text: str) -> list[float]:
    """Return the numbers that stand in the place of each # of a pattern, wherever it is found."""
    found = re.findall(re.escape(pattern).replace(r"\#", r"(nan|[\d.]+(?:e[-+]\d+)?)"), text)
    assert found, f"no {pattern!r} in {text}"
    return [float(value) for match in found for value in ([match] if isinstance(match, str) else match)]


@pytest.mark.slow
def test_fine_tuning_an_open_clip_model(tmp_path: Path) -> None:
    printed = run("finetune_open_clip.py", tmp_path)
    assert "accelerated: the model, visual" in printed
    losses = numbers("loss #,", printed)
    assert len(losses) == 6
    # of a hundred pairs, ten a class: ln 100 for a model that knows nothing, ln 10 for one that knows all
    assert losses[-1] < 3.0 < 4.0 < losses[0]
    (before,), (after,) = numbers("before: #%", printed), numbers("after: #%", printed)
    assert before < 30
    assert after > 60
    assert numbers("runs/digits, read by plain open_clip: #%", printed) == [after]
    assert (tmp_path / "runs" / "digits" / "open_clip_model.safetensors").is_file()


@pytest.mark.slow
def test_a_pipeline_of_transformers(tmp_path: Path) -> None:
    printed = run("transformers_pipeline.py", tmp_path, "--dtype", "float64")
    assert "accelerated: text_model, vision_model" in printed
    scores = numbers("# (#)", printed)
    assert len(scores) == 3 * 3 * 2
    assert max(scores) > 1.2 * min(scores) > 0
    assert numbers("largest difference #", printed)[0] <= 1e-12


@pytest.mark.slow
def test_two_ranks_of_ddp(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps(small.CONFIG))
    options = ["--dtype", "float64", "--steps", 2, "--model", "sizes.json"]
    # of an odd batch, one rank has a pair more
    printed = run("ddp.py", tmp_path, *options, "--batch-size", 9)
    assert printed.count(" on 2 ranks, ") == 2
    in_loss, in_gradients = numbers("largest relative difference: loss #, gradients #", printed)
    assert in_loss <= 1e-12
    assert in_gradients <= 1e-12


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    printed = run("onnx_export.py", tmp_path, small.run(tmp_path / "model"))
    for tower in ("image", "text"):
        assert (tmp_path / "runs" / "onnx" / f"{tower}.onnx").is_file()
        assert numbers(f"{tower} features [5, 16]: largest relative difference #", printed)[0] <= 1e-5


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_is_short_and_public(script: str) -> None:
    text = (EXAMPLES / script).read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert re.search(r"^    pip install ", text, re.M)
    imported = re.findall(r"^\s*(?:import|from) (\S+)", text, re.M)
    assert [name for name in imported if name.startswith("clipfast")] == ["clipfast"]
    for name in re.findall(r"\bclipfast\.(\w+)", text):
        assert name in clipfast.__all__ or name == "data", name


def test_the_page_has_their_commands() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        assert f"| [{script}]({script}) |" in page
        assert f"\n{shlex.join(first_command(script))}\n" in page
