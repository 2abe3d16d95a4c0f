"""Builds the CUDA kernels' own source for the CPU, under the fibre shim, and runs them over numpy arrays."""

from __future__ import annotations

import atexit
import ctypes
import functools
import getpass
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent.parent
RULES = """
rule compile
  command = {cxx} {options} {flags} {includes} -c $in -o $out
rule link
  command = {cxx} -shared $in -o $out
build {name}.o: compile {source}
build {name}.so: link {name}.o
"""
# of the shim: what takes much of the compiler's time, once for all edits of the tile engine
HEADERS = ("ucontext.h", "cmath", "cstring", "deque", "exception", "functional", "stdexcept", "string", "vector")
OPTIONS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden")
Edit = Callable[[str], str]
Edits = Mapping[str, Edit]


def _compile(name: str, edits: Edits, flags: str = "", python: bool = False) -> tuple[Path, str]:
    """Compile ``tests/support/<name>.cpp`` with ``csrc/cuda``; give the library and the key that it was kept under.

    Args:
        name: What to compile.
        edits: Changes of files of ``csrc/cuda``, by the files' names.
        flags: For the compiler.
        python: Whether it is an extension module, whose init function is named after the key.
    """
    compiler = next((c for c in (os.environ.get("CXX"), "c++", "g++") if c and shutil.which(c.split()[0])), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    ninja = pytest.importorskip("ninja")
    source = ROOT / "tests" / "support" / f"{name}.cpp"
    files = {path.name: path.read_text() for path in sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))}
    shim = (ROOT / "tests" / "support" / "fibre_shim.hpp").read_text()
    for edited, edit in edits.items():
        changed = edit(files[edited])
        assert changed != files[edited], "the edit found nothing to change"
        files[edited] = changed
    ingredients = [*OPTIONS, flags, compiler, sys.version, shim, source.read_text(), RULES, *files.values()]
    key = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"clipfast-kernels-{getpass.getuser()}" / key
    library = folder / f"{name}.so"
    if not library.exists():
        (folder / "cuda").mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (folder / "cuda" / file).write_text(text)
        includes = [folder, source.parent]
        if python:
            flags += f" -DMODULE={name}_{key}"
            includes += [pytest.importorskip("pybind11").get_include(), sysconfig.get_paths()["include"]]
        else:
            flags += f" -include {_headers(compiler)}"
        rules = RULES.format(
            cxx=compiler,
            options=" ".join(OPTIONS),
            flags=flags,
            includes=" ".join(f"-I{path}" for path in includes),
            name=name,
            source=source,
        )
        (folder / "build.ninja").write_text(rules)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return library, key


@functools.cache
def _headers(compiler: str) -> Path:
    """Precompile the headers of the C++ library; return the file that is included in their place."""
    folder = Path(tempfile.mkdtemp(prefix="clipfast-headers-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "headers.h"
    file.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
    command = [*compiler.split(), *OPTIONS, "-x", "c++-header", str(file), "-o", f"{file}.gch"]
    subprocess.run(command, check=True)
    return file


def build(edits: Edits | None = None) -> ModuleType:
    """Compile and import the kernels.

    Args:
        edits: Changes of files of ``csrc/cuda``, by their names, for tests of what a mistake would do. Such a build
            knows float32 and bfloat16 alone. Mistakes may be in it together: ``module.mistake(i)`` sets
            ``shim::mistake``, which is -1 at first.
    """
    name = "contrastive_loss_on_cpu"
    library, key = _compile(name, edits or {}, "-DCLIPFAST_FEW_DTYPES" if edits else "", python=True)
    # pybind11 hands out one module for one name, so each build has a name of its own
    loader = importlib.machinery.ExtensionFileLoader(f"{name}_{key}", str(library))
    spec = importlib.util.spec_from_loader(f"{name}_{key}", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@functools.cache
def build_step(edit: Edit | None = None, edited: str = "tile_engine.cuh") -> Callable[..., None]:
    """Compile the tile engine alone; return a function that runs one of ``tensor_core_step_on_cpu.cpp``'s kernels.

    It takes the kernel's name, arrays (as their addresses) and integers, and raises a RuntimeError where the shim finds
    what a card would leave undefined.
    """
    library, _ = _compile("tensor_core_step_on_cpu", {} if edit is None else {edited: edit})
    step = ctypes.CDLL(str(library))

    def run(name: str, *arguments: np.ndarray | int) -> None:
        function = getattr(step, name)
        function.restype = ctypes.c_char_p
        for array in (a for a in arguments if isinstance(a, np.ndarray)):
            assert array.flags.c_contiguous, "arrays go by their address"
        error = function(
            *(ctypes.c_void_p(a.ctypes.data) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments)
        )
        if error:
            raise RuntimeError(error.decode())

    return run


# ---------------------------------------------------------------------------------------------------------------------
# arrays: 16-bit floats that numpy has not are kept as their bits; what lies around an array is NaN

SUMS = {"float64": np.float64, "float32": np.float32, "float16": np.float32, "bfloat16": np.float32}
STORED = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
MARGIN = 64  # elements on either side


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Round to ``dtype`` as it is stored."""
    if dtype != "bfloat16":
        return x.astype(STORED[dtype])
    wide = x.astype(np.float32).view(np.uint32)
    return ((wide + 0x7FFF + (wide >> 16 & 1)) >> 16).astype(np.uint16)


def to_float64(x: np.ndarray, dtype: str) -> np.ndarray:
    """Read what is stored."""
    return x.astype(np.float64) if dtype != "bfloat16" else (x.astype(np.uint32) << 16).view(np.float32).astype(float)


def _nan(dtype: Any) -> Any:
    return np.uint16(0x7FC1) if dtype == np.uint16 else np.dtype(dtype).type(np.nan)


class Padded:
    """An array whose rows and whose ends are surrounded by NaN, and that says whether anything was written there."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, pitch: int | None = None, shift: int = 0) -> None:
        columns = shape[-1] if len(shape) == 2 else 1
        self.pitch = pitch or columns
        count = int(shape[0]) * self.pitch
        buffer = np.full(MARGIN * 2 + count + 16, _nan(dtype), dtype)
        # from 16 bytes on, then `shift` elements behind
        start = MARGIN + (-(buffer.ctypes.data + MARGIN * buffer.itemsize) % 16) // buffer.itemsize + shift
        self._all, self._mask = buffer, np.ones(buffer.size, bool)
        rows = (shape[0], self.pitch)
        self.array = buffer[start : start + count].reshape(rows)[:, :columns]
        self._mask[start : start + count].reshape(rows)[:, :columns] = False
        if len(shape) == 1:
            self.array = self.array[:, 0]
        self._before = buffer[self._mask].tobytes()

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    def assert_untouched_around(self) -> None:
        assert self._all[self._mask].tobytes() == self._before, "a kernel wrote outside an array"
