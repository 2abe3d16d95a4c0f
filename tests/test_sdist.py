"""The archive of sources: what it holds, that it has the same bits twice, and that a wheel comes out of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import clipfast

ROOT = Path(__file__).parent.parent
HEAD = f"clipfast-{clipfast.__version__}"


def make_sdist(folder: Path) -> Path:
    command = [sys.executable, ROOT / "scripts" / "build_wheel.py", "--sdist", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.tar.gz")
    return made


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdist(tmp_path_factory.mktemp("sdist"))


def held(sdist: Path) -> set[str]:
    with tarfile.open(sdist) as archive:
        return {m.name.removeprefix(f"{HEAD}/") for m in archive if m.isfile()}


def expected() -> set[str]:
    found = {"setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "PKG-INFO", "README.md", "LICENSE"}
    found |= {"CHANGELOG.md", "CONTRIBUTING.md"}
    found |= {"THIRD_PARTY_LICENSES", "scripts/manylinux.py", "scripts/sbom.py", "clipfast/py.typed"}
    found.add("scripts/editable.py")
    found |= {f"clipfast/data/{name}" for name in ("VOCABULARY_LICENSE", "bpe_simple_vocab_16e6.txt.gz")}
    found.add("clipfast/evaluate/imagenet.json")
    names = ("PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt")
    found |= {f"clipfast.egg-info/{name}" for name in names}
    for folder, pattern in (("clipfast", "*.py"), ("kernels", "*.py"), ("csrc", "*.*")):
        found |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob(pattern)}
    return found


def test_what_it_holds(sdist: Path) -> None:
    assert held(sdist) == expected()
    with tarfile.open(sdist) as archive:
        for member in archive:
            # who packed it, where, and when
            assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", ""), member.name
            assert f"{ROOT}/".encode() not in archive.extractfile(member).read(), member.name


def test_the_same_input_makes_the_same_archive(sdist: Path, tmp_path: Path) -> None:
    second = make_sdist(tmp_path)
    assert hashlib.sha256(second.read_bytes()).digest() == hashlib.sha256(sdist.read_bytes()).digest()


def test_a_tree_that_was_built_in_leaves_nothing_in_it(tmp_path: Path) -> None:
    # as `python -m build --sdist` does it
    tree = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "*.so", "_build.json", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=skipped)
    (tree / "clipfast" / "__pycache__").mkdir()
    for residue in ("libclipfast.so", "_build.json", "__pycache__/cli.cpython-311.pyc"):
        (tree / "clipfast" / residue).write_bytes(b"residue")
    (tree / "csrc" / "library.o").write_bytes(b"residue")
    code = "from setuptools import build_meta; build_meta.build_sdist('dist')"
    for _ in range(2):  # the second finds the list of files of the first
        done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (made,) = (tree / "dist").glob("*.tar.gz")
        assert held(made) == expected()


def make_wheel(sdist: Path, folder: Path, *options: str, **environment: str) -> zipfile.ZipFile:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *options, "--wheel-dir", folder, sdist]
    environment = os.environ | {"CLIPFAST_SKIP_CUDA": "1"} | environment
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)
    if "No matching distribution found for setuptools" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.slow
def test_a_wheel_comes_out_of_it(sdist: Path, tmp_path: Path, compiled_once: dict[str, str]) -> None:
    if not any(shutil.which(c) for c in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    # the stand-ins for an older C library are in it too
    wheel = make_wheel(sdist, tmp_path, "--no-build-isolation", CLIPFAST_GLIBC="2.28", **compiled_once)
    record = json.loads(wheel.read("clipfast/_build.json"))
    assert record["reason"] is None
    assert record["libstdcxx"] is not None
    assert hashlib.sha256(wheel.read("clipfast/libclipfast.so")).hexdigest() == record["sha256"]
    assert {n.split("/")[0] for n in wheel.namelist()} == {"clipfast", f"{HEAD}.dist-info"}


@pytest.mark.slow
def test_build_isolation_finds_the_headers_of_the_pytorch_that_is_there(sdist: Path, tmp_path: Path) -> None:
    # a compiler that fails is quick, and is asked once PyTorch was found
    record = json.loads(make_wheel(sdist, tmp_path, CXX="false").read("clipfast/_build.json"))
    assert record["reason"].startswith("false failed")
