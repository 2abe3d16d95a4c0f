"""Building and installing: what a wheel holds, and an install without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources, as ``pip install .`` does, without fetching anything."""
    source = folder / "source"
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "*.egg-info", "*.so", "_build.json", "__pycache__"
    )
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_installed(site: Path, code: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # -S leaves the editable install of the tests' own environment out; PyTorch's folder comes back by hand
    torch_home = Path(__import__("torch").__file__).parent.parent
    code = f"import sys; sys.path[:0] = [{str(site)!r}, {str(torch_home)!r}]\n{code}"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_works_outside_the_tree(tmp_path: Path, compiled_once: dict[str, str]) -> None:
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    wheel = build_wheel(tmp_path, CLIPFAST_SKIP_CUDA="1", **compiled_once)
    assert "-py3-none-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(site)
    assert {"clipfast/kernels/__init__.py", "clipfast/libclipfast.so", "clipfast/py.typed"} <= set(names)
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "benchmarks/", "csrc/"))]
    code = "import clipfast; from clipfast.ops import library; print(clipfast.__file__, library.build_info()['cpu'])"
    assert run_installed(site, code).startswith(str(site))
    assert "3" in run_installed(site, "import clipfast; print(clipfast.tokenize(['a', 'b', 'c']).shape[0])")


def test_without_a_compiler_it_installs_and_says_so(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="no-such-compiler")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    assert not (site / "clipfast" / "libclipfast.so").exists()
    record = json.loads((site / "clipfast" / "_build.json").read_text())
    assert record["reason"] == "no C++ compiler was found (no-such-compiler)"
    code = "from clipfast.ops import library; print(library.unavailable())"
    assert "no C++ compiler was found" in run_installed(site, code)


def test_a_compiler_that_fails_is_named(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, CXX="false")
    record = json.loads(zipfile.ZipFile(wheel).read("clipfast/_build.json"))
    assert record["reason"].startswith("false failed")


@pytest.mark.parametrize(
    ("nvcc", "environment", "reason"),
    [
        (None, {}, "no nvcc was found (in {home}/bin, as CUDA_HOME says)"),
        ("echo 'error: no host compiler' >&2; exit 1", {}, "{home}/bin/nvcc failed: error: no host compiler"),
        ("exit 1", {"TORCH_CUDA_ARCH_LIST": "8.0;Hopper"}, "TORCH_CUDA_ARCH_LIST: got 'Hopper', expected numbers"),
        ("exit 1", {"TORCH_CUDA_ARCH_LIST": "7.5"}, "TORCH_CUDA_ARCH_LIST: got 7.5, the kernels need 8.0 or later"),
        ("exit 1", {"CLIPFAST_SKIP_CUDA": "1"}, "CLIPFAST_SKIP_CUDA=1 was set"),
    ],
)
def test_without_cuda_the_rest_is_built(
    tmp_path: Path, compiled_once: dict[str, str], nvcc: str | None, environment: dict, reason: str
) -> None:
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    if nvcc is not None:
        (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{nvcc}\n")
        (home / "bin" / "nvcc").chmod(0o755)
    wheel = zipfile.ZipFile(build_wheel(tmp_path, CUDA_HOME=str(home), **compiled_once, **environment))
    record = json.loads(wheel.read("clipfast/_build.json"))
    assert record["reason"] is None
    assert record["cuda"] is None
    assert record["cuda_reason"].startswith(reason.format(home=home))
    assert "clipfast/libclipfast.so" in wheel.namelist()
