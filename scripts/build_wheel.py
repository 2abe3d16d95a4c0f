#!/usr/bin/env python3
"""Builds one wheel that serves every Python 3 and every card, on a machine without a GPU, and checks what it says.

    scripts/build_wheel.py [--cpu] [--archs "9.0a"] [--output FOLDER]
    scripts/build_wheel.py --sdist [--output FOLDER]

Wheels of one version have one name whatever they hold, so each kind has a folder of its own: dist/, dist/cpu/, and
dist/9.0a/ for the architectures that were asked for. It is built from a copy of the sources. Its tag is what
scripts/manylinux.py finds to be true of the library in it. Without nvcc there is no wheel, but with --cpu there is.
--sdist makes the archive of sources that pip builds a wheel from where it installs.
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import manylinux

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("clipfast", "kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "THIRD_PARTY_LICENSES")
SOURCES += ("CHANGELOG.md", "CONTRIBUTING.md", "MANIFEST.in")
SOURCES += ("scripts/editable.py", "scripts/manylinux.py", "scripts/sbom.py")
LEFT_OUT = shutil.ignore_patterns("*.so", "_build.json", "__pycache__", "*.egg-info")
# code for every card from A100 to RTX PRO Blackwell; PTX of compute_100 for the others of today and those to come
ARCHITECTURES = "8.0;8.6;8.9;9.0a;10.0+PTX;12.0"
OLDEST_GLIBC = "2.28"
# what a wheel may hold
CONTENTS = re.compile(
    r"clipfast/([a-z_]+/)*[a-z_0-9]+\.py|clipfast/(py\.typed|libclipfast\.so|_build\.json)"
    r"|clipfast/data/(bpe_simple_vocab_16e6\.txt\.gz|VOCABULARY_LICENSE)|clipfast/evaluate/imagenet\.json"
    r"|clipfast-[\d.]+\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|top_level\.txt"
    r"|sboms/clipfast\.cdx\.json|licenses/(LICENSE|THIRD_PARTY_LICENSES|clipfast/data/VOCABULARY_LICENSE))"
)
LICENCES = ("LICENSE", "THIRD_PARTY_LICENSES", "clipfast/data/VOCABULARY_LICENSE")


class Failed(Exception):
    """Why there is no wheel."""


@contextmanager
def workshop() -> Iterator[Path]:
    """Give an empty folder, always the same: nvcc writes the place of its source into names, and so into the bits."""
    folder = ROOT / "build" / "wheel"
    folder.parent.mkdir(exist_ok=True)
    with (folder.parent / "wheel.lock").open("w") as lock:
        # the folder is another build's until the lock is this one's
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def copy_sources(folder: Path) -> None:
    """Copy what a wheel is built from, and nothing that an earlier build left."""
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=LEFT_OUT)
        else:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def build(source: Path, output: Path, architectures: str | None) -> Path:
    """Build a wheel with this Python's setuptools and PyTorch; None for the architectures leaves CUDA out."""
    environment = {"CLIPFAST_GLIBC": OLDEST_GLIBC, "SOURCE_DATE_EPOCH": source_date(), "PYTHONHASHSEED": "0"}
    environment |= {"CLIPFAST_SKIP_CUDA": "1"} if architectures is None else {"TORCH_CUDA_ARCH_LIST": architectures}
    cleared = ("CLIPFAST_SKIP_CUDA", "CLIPFAST_SKIP_LIBRARY", "TORCH_CUDA_ARCH_LIST")
    inherited = {k: v for k, v in os.environ.items() if k not in cleared}
    command = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(output), "."]
    done = subprocess.run(command, cwd=source, env=inherited | environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the build failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    (wheel,) = output.glob("*.whl")
    return wheel


def build_sdist(source: Path, output: Path) -> Path:
    """Pack the sources with this Python's setuptools, the same bytes for the same input."""
    code = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(output)], cwd=source, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"the sdist failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    (made,) = output.glob("*.tar.gz")
    # as it comes it tells who packed it and when
    with tarfile.open(made) as archive:
        members = [(m, archive.extractfile(m).read()) for m in sorted(archive, key=lambda m: m.name) if m.isfile()]
    with (
        made.open("wb") as raw,
        gzip.GzipFile("", "wb", mtime=0, fileobj=raw) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member, content in members:
            fresh = tarfile.TarInfo(member.name)
            fresh.size, fresh.mtime = len(content), int(source_date())
            fresh.mode = 0o755 if member.mode & 0o100 else 0o644
            archive.addfile(fresh, io.BytesIO(content))
    return made


def source_date() -> str:
    """Return the time that files of the wheel are given: the last commit's, so that the same input makes the same."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return os.environ["SOURCE_DATE_EPOCH"]
    done = subprocess.run(["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "1577836800"


def check(wheel: Path, cuda: bool, folders: list[Path]) -> tuple[dict, str]:
    """Check a wheel; return what its build wrote down and its platform tag.

    Args:
        wheel: The file.
        cuda: Whether it should hold CUDA code.
        folders: Places of this machine that nothing in it may name.

    Raises:
        Failed: Something is missing or too much in it.
    """
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as temporary:
        names = archive.namelist()
        strange = [name for name in names if CONTENTS.fullmatch(name) is None]
        if strange:
            raise Failed(f"the wheel holds what it should not: {', '.join(strange)}")
        for licence in LICENCES:
            if not any(name.endswith(f".dist-info/licenses/{licence}") for name in names):
                raise Failed(f"the wheel lacks the licence {licence}")
        record = json.loads(archive.read("clipfast/_build.json"))
        if record["library"] is None:
            raise Failed(f"the op library was not built: {record['reason']}")
        if cuda and record["cuda"] is None:
            raise Failed(
                f"the op library was built without CUDA: {record['cuda_reason']} (CPU=1 makes a wheel for CPUs)"
            )
        for name in names:
            content = archive.read(name)
            for folder in folders:
                if f"{folder}/".encode() in content:
                    raise Failed(f"{name} names {folder}, a place of the machine that built it")
        library = Path(archive.extract("clipfast/libclipfast.so", temporary))
        if hashlib.sha256(library.read_bytes()).hexdigest() != record["sha256"]:
            raise Failed("the op library is not the file that _build.json tells of")
        try:
            tag = manylinux.best_tag(library, manylinux.machine())
        except manylinux.NotAllowed as error:
            print(f"note: {error}")
            tag = f"linux_{manylinux.machine()}"
    return record, tag


def retag(wheel: Path, tag: str) -> Path:
    """Give a wheel its platform tag."""
    command = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", tag, str(wheel)]
    environment = os.environ | {"SOURCE_DATE_EPOCH": source_date()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"wheel tags failed: {done.stderr.strip()}")
    return wheel.parent / done.stdout.strip().splitlines()[-1]


def places(*others: Path) -> list[Path]:
    """Return the folders of this machine that a wheel should not name."""
    found = {ROOT, Path(sys.prefix).resolve(), Path(sys.prefix), *others, *(p.resolve() for p in others)}
    home = Path.home()
    return sorted(found | ({home} if len(home.parts) > 1 else set()))


def main() -> int:
    """Build, check, tag and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="leave CUDA out")
    parser.add_argument("--archs", default="", help=f"such as '8.0;9.0a', '+PTX' behind one ({ARCHITECTURES})")
    parser.add_argument("--output", type=Path, help="the folder for the wheel")
    parser.add_argument("--sdist", action="store_true", help="pack the sources, and build no wheel")
    options = parser.parse_args()
    if options.cpu + bool(options.archs) + options.sdist > 1:
        parser.error("--cpu, --archs and --sdist: got several, expected one of them")
    output = options.output or ROOT / "dist" / ("cpu" if options.cpu else re.sub(r"[;, ]+", "_", options.archs))
    began = time.monotonic()
    try:
        with workshop() as temporary:
            source, made = temporary / "source", temporary / "made"
            source.mkdir()
            copy_sources(source)
            if options.sdist:
                output.mkdir(parents=True, exist_ok=True)
                made.mkdir()
                sdist = build_sdist(source, made)
                print(shutil.copy2(sdist, output / sdist.name))
                return 0
            wheel = build(source, made, None if options.cpu else options.archs or ARCHITECTURES)
            record, tag = check(wheel, not options.cpu, places(source))
            wheel = retag(wheel, tag)
            output.mkdir(parents=True, exist_ok=True)
            target = Path(shutil.copy2(wheel, output / wheel.name))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{target}")
    size, seconds = target.stat().st_size / 1e6, time.monotonic() - began
    print(f"  {size:.1f} MB, built in {seconds:.0f} s, the largest process took {memory:.1f} GB")
    print(f"  CUDA: {record['cuda'] or 'none'}; SHA-256 {hashlib.sha256(target.read_bytes()).hexdigest()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
