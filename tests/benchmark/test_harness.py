"""``pytest benchmarks/`` itself, on sizes that take seconds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.benchmark.results import read_run

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "pytest", "--scale", "smoke", *arguments]
    # to pytest-benchmark a worker's environment means xdist, under which it measures nothing
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=folder, env=inherited | environment, capture_output=True, text=True, timeout=500)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def copied(tmp_path):
    """The benchmarks as somebody has them who installed a wheel: without a clone around them."""
    return Path(
        shutil.copytree(BENCHMARKS, tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    )


def test_a_selection_from_anywhere(copied):
    code, output = run(copied.parent, "benchmarks/test_attention.py", "-k", "forward and 50", CLIPFAST_COMMIT="abc")
    assert code == 0, output
    assert "no NVIDIA GPU: measuring the CPU" in output
    (path,) = copied.glob("results/*/*.json")
    assert path.name == "abc-part.json"
    found = read_run(path)
    assert not found.complete
    assert found.scale == "smoke"
    assert [row.direction for row in found.rows] == ["forward", "forward and backward"]
    for row in found.rows:
        assert row.sides["clipfast"].error < 1e-5
        assert row.limit_s > 0
        assert row.missing["SDPA cuDNN"] == "needs a GPU"
        assert row.name in output


def test_all_of_a_folder_is_complete(copied):
    for path in copied.glob("test_*.py"):
        if path.stem != "test_tokenizer":
            path.unlink()
    code, output = run(copied.parent, "benchmarks", "--results", "all.json")
    assert code == 0, output
    assert read_run(copied.parent / "all.json").complete


def test_without_pytest_benchmark(copied):
    chosen = ["benchmarks/test_attention.py", "-k", "forward and 50 and not backward", "-p", "no:benchmark"]
    code, output = run(copied.parent, *chosen, "--results", "one.json")
    assert code == 0, output
    assert len(read_run(copied.parent / "one.json").rows[0].sides["clipfast"].device_s) >= 2


def test_a_wrong_kernel_is_not_timed(copied):
    chosen = ["benchmarks/test_attention.py", "-k", "50", "-p", "planted", "--results", "none.json"]
    code, output = run(copied.parent, *chosen, PYTHONPATH=str(copied), CLIPFAST_PLANTED="wrong")
    assert code == 1
    assert "2 failed" in output
    assert "WrongResult: attention, forward, [1, 50, 12, 64], float32: clipfast is wrong: error" in output
    assert not (copied.parent / "none.json").exists()


def test_benchmarks_that_are_disabled_write_nothing(copied):
    pytest.importorskip("pytest_benchmark")
    chosen = ["benchmarks/test_attention.py", "-k", "50", "--benchmark-disable", "--results", "none.json"]
    code, output = run(copied.parent, *chosen)
    assert code == 0, output
    assert not (copied.parent / "none.json").exists()
