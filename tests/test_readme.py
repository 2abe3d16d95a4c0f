"""The README is followed from its first line to its last, and its figures are those of a record."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clipfast
from clipfast.benchmark.markdown import regenerated
from clipfast.benchmark.results import read_run

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
if not (ROOT / "docs").is_dir():
    pytest.skip("not a clone", allow_module_level=True)

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
BLOCKS = BLOCK.findall(README.read_text(encoding="utf-8"))
SCRIPT = re.compile(r"# (\w+\.py), for: (.+)\n")


def commands_of(text: str) -> list[str]:
    """The commands of a block, without what explains them."""
    return [command for line in text.splitlines() if (command := line.partition("#")[0].strip())]


COMMANDS = [command for kind, text in BLOCKS if kind == "console" for command in commands_of(text)]
# In the place of what takes minutes, or would install into the environment that the tests run in. {tmp} stands for the
# newcomer's folder, {venv} for the clone's environment; these run in the clone, where the others' programs come from.
SHORTENED = {
    "make demo": "make demo ARGS='--steps 2 --batch-size 16 --output {tmp}/runs/demo'",
    "make test": "make test JOBS=0 ARGS='--collect-only -q tests/ops'",
    "source .venv/bin/activate": "test -x .venv/bin/python",
    "pip install .": "{venv}/python -m pip install --quiet --no-deps --no-build-isolation --target {tmp}/site .",
}
# appended to a command as it stands
SMALLER = {"clipfast train": " --steps 2 --batch-size 32 --val-pairs 32"}
LEAVES = {
    "make demo": "runs/demo/report.html",
    "pip install .": "site/clipfast/kernels/__init__.py",
    "clipfast train": "runs/emoji/model.safetensors",
    "clipfast show": "runs/show/report.html",
}


def test_blocks_are_of_two_kinds() -> None:
    assert {kind for kind, _ in BLOCKS} == {"python", "console"}
    assert {"make demo", "make test"} <= set(COMMANDS)
    for words in (*SHORTENED, *SMALLER, *LEAVES):
        assert any(words in line for line in COMMANDS), words


@pytest.mark.slow
def test_a_newcomer_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled_once: dict[str, str]) -> None:
    """Every block and every command, in the order in which they stand."""
    if shutil.which("make") is None or not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the commands work on a clone with make and its own .venv")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    for kind, text in BLOCKS:
        if kind == "console":
            for command in commands_of(text):
                follow(command, tmp_path, compiled_once)
        elif script := SCRIPT.match(text):
            Path(script[1]).write_text(text, encoding="utf-8")
            follow(script[2], tmp_path, compiled_once)
        else:
            exec(compile(text, "README.md", "exec"), namespace)


def follow(command: str, folder: Path, compiled_once: dict[str, str]) -> None:
    """Run a command of the README, or what stands in its place."""
    venv = ROOT / ".venv" / "bin"
    line = SHORTENED[command].format(tmp=folder, venv=venv) if command in SHORTENED else command
    line += "".join(more for words, more in SMALLER.items() if words in command)
    # `make` has compiled the CUDA half for the environment that this runs in
    environment = os.environ | ({} if command.startswith("make") else {"CLIPFAST_SKIP_CUDA": "1"} | compiled_once)
    environment["PATH"] = os.pathsep.join([str(venv), str(Path(sys.executable).parent), os.environ["PATH"]])
    cwd = ROOT if command in SHORTENED else folder
    done = subprocess.run(["bash", "-c", line], cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (line, done.stdout[-3000:], done.stderr[-3000:])
    for words, file in LEAVES.items():
        assert words not in command or (folder / file).is_file(), (line, file)


# what images are given in
PAGES = {
    "contrastive_loss.md": torch.float32,
    "fallback.md": torch.float32,
    "inference.md": torch.bfloat16,
    "kernels.md": torch.float32,
    "models.md": torch.float32,
}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_of_a_page(page: str) -> None:
    """The blocks of a page run one after another, with a model and a batch at hand."""
    found = BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    blocks = [text for kind, text in found if kind == "python"]
    assert blocks
    vision = {"image_size": 224, "patch_size": 32, "width": 64, "layers": 2}
    model = clipfast.create_model(
        {"embed_dim": 32, "vision_cfg": vision, "text_cfg": {"width": 64, "heads": 1, "layers": 2}}
    ).eval()
    images, tokens = torch.randn(2, 3, 224, 224, dtype=PAGES[page]), clipfast.tokenize(["a red wall", "a dog"])
    namespace = {"clipfast": clipfast, "torch": torch, "model": model, "images": images, "tokens": tokens}
    for text in blocks:
        exec(compile(text, page, "exec"), namespace)


def test_its_figures_are_those_of_a_record() -> None:
    """Sentence, chart and tables are what `clipfast-bench readme` makes of a run that is committed, byte by byte."""
    commit = re.search(r"Measured on \S+ at commit `([^`]+)`", README.read_text(encoding="utf-8")).group(1)
    (path,) = ROOT.glob(f"benchmarks/results/*/{commit}.json")
    for file, text in regenerated(read_run(path), README).items():
        assert file.read_bytes() == text.encode(), file
