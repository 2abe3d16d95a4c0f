"""Building and installing: what a wheel holds, an install without a compiler, and one for development."""

from __future__ import annotations

import base64
import hashlib
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


def copy_sources(source: Path) -> Path:
    """Make a clone that nothing was built in."""
    skipped = shutil.ignore_patterns(
        ".git", ".venv", "runs", "build", "*.egg-info", "*.so", "_build.json", "__pycache__"
    )
    return Path(shutil.copytree(ROOT, source, ignore=skipped))


def build_wheel(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources, as ``pip install .`` does, without fetching anything."""
    source = copy_sources(folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def run_installed(site: Path, code: str, said: list[str] | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # -S leaves the editable install of the tests' own environment out; PyTorch's folder comes back by hand
    torch_home = Path(__import__("torch").__file__).parent.parent
    code = f"import sys; sys.path[:0] = [{str(site)!r}, {str(torch_home)!r}]\n{code}"
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    if said is not None:
        said += done.stderr.splitlines()
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
    said: list[str] = []
    tower = "clipfast.ViT(image_size=16, patch_size=8, width=16, layers=1, heads=1)"
    run_installed(site, f"import clipfast, torch\nfor _ in range(2): {tower}(torch.zeros(1, 3, 16, 16))", said)
    (warning,) = (line for line in said if "Warning: " in line)
    assert "clipfast: the op library was not built: no C++ compiler was found (no-such-compiler): " in warning
    assert "To build it, set CXX to a C++ compiler, then run `pip install --force-reinstall --no-deps " in warning


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


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A clone named clipfast, and the folder that ``pip install -e`` would fill."""
    clone = copy_sources(tmp_path_factory.mktemp("editable") / "clipfast")
    code = "from setuptools import build_meta; build_meta.build_editable('..')"
    environment = os.environ | {"CLIPFAST_SKIP_LIBRARY": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = clone.parent.glob("*.whl")
    site = clone.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(set(names)) == len(names)
        archive.extractall(site)
    # pip takes out again what is listed here
    (listed,) = site.glob("*.dist-info/RECORD")
    rows = [line.rsplit(",", 2) for line in listed.read_text().splitlines()]
    assert sorted(name for name, _, _ in rows) == sorted(names)
    for name, digest, size in rows:
        if digest:
            content = (site / name).read_bytes()
            found = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            assert (digest, size) == (f"sha256={found}", str(len(content))), name
    return clone, site


def found_from(folder: Path, site: Path, *before: Path) -> list[str]:
    """Which clipfast and which kernels Python finds when it is started in a folder."""
    code = f"import site, sys; sys.path[1:1] = {list(map(str, before))!r}; site.addsitedir({str(site)!r})\n"
    code += "import clipfast, clipfast.kernels; print(clipfast.__file__, clipfast.kernels.__file__)"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_an_editable_install_is_found_beside_folders_of_its_name(editable: tuple[Path, Path], tmp_path: Path) -> None:
    clone, site = editable
    ours = [str(clone / "clipfast" / "__init__.py"), str(clone / "kernels" / "__init__.py")]
    (tmp_path / "clipfast" / "runs").mkdir(parents=True)
    for folder in (clone.parent, clone, tmp_path):
        assert found_from(folder, site) == ours
    # code comes in the order of the path, as ever
    for name in ("clipfast", "clipfast/kernels"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "__init__.py").touch()
    theirs = [str(tmp_path / name / "__init__.py") for name in ("clipfast", "clipfast/kernels")]
    assert found_from(tmp_path, site) == theirs
    assert found_from(clone.parent, site, tmp_path) == theirs


def test_a_strict_editable_install_keeps_its_links(tmp_path: Path) -> None:
    clone = copy_sources(tmp_path / "clipfast")
    code = "from setuptools import build_meta; build_meta.build_editable('..', {'editable_mode': 'strict'})"
    environment = os.environ | {"CLIPFAST_SKIP_LIBRARY": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=clone, env=environment, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    package, kernels = found_from(tmp_path, tmp_path / "site")
    assert package.startswith(str(clone / "build"))
    assert kernels == str(Path(package).parent / "kernels" / "__init__.py")
