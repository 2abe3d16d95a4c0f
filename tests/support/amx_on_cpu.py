"""Builds the AMX kernels' own source on software tiles, and runs them over tensors on a CPU without AMX."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import getpass
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import compile_once
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
# the op library's operators on software tiles are in a namespace of their own, beside those of the real one
NAMESPACE = "clipfast_software_tiles"
FLAGS = ("-std=c++17", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
SOFTWARE = ("-DCLIPFAST_SOFTWARE_TILES", f"-Dclipfast={NAMESPACE}")
EDITED = (*FLAGS, *SOFTWARE, "-O0")
HEADERS = ("immintrin.h", "algorithm", "cstring", "vector")
KERNELS = ("cpu/amx.cpp", "cpu/encoder_amx.cpp", "cpu/products_amx.cpp")
LIBRARY = ("cpu/encoder.cpp", "cpu/products.cpp", "cpu/products_bf16.cpp", "cpu/contrastive_loss.cpp", "library.cpp")
EMULATOR = "../tests/support/amx_emulator_on_cpu.cpp"
HARNESS = "../tests/support/amx_on_cpu.cpp"
Edit = Callable[[str], str]
Run = Callable[..., int]


def compiler() -> str:
    """Return the C++ compiler; skip where there is none."""
    if not sys.platform.startswith("linux") or os.uname().machine != "x86_64":
        pytest.skip("AMX is x86-64's, and asked for on Linux")
    found = next((c for c in (os.environ.get("CXX"), "c++", "g++") if c and shutil.which(c.split()[0])), None)
    if found is None:
        pytest.skip("no C++ compiler")
    return found.split()[-1]


def compile_file(source: str, target: Path, flags: tuple[str, ...], tree: Path = ROOT / "csrc") -> None:
    """Compile a file of ``csrc`` or of this folder; what was compiled before is taken again."""
    # relative names: the same text in another place is the same text
    objects = Path(tempfile.gettempdir()) / f"clipfast-kernels-{getpass.getuser()}" / "amx"
    command = [sys.executable, str(Path(compile_once.__file__)), str(objects), compiler(), *FLAGS, *flags, "-I."]
    done = subprocess.run([*command, "-c", source, "-o", str(target)], capture_output=True, text=True, cwd=tree)
    assert done.returncode == 0, done.stderr


def _compile(folder: Path, sources: dict[str, tuple[str, ...]], tree: Path = ROOT / "csrc") -> None:
    """Compile files, each with its flags, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        work = [pool.submit(compile_file, s, folder / f"{Path(s).stem}.o", flags, tree) for s, flags in sources.items()]
        for one in work:
            one.result()


def _link(objects: list[Path], library: Path, *links: str) -> Path:
    subprocess.run([compiler(), "-shared", *map(str, objects), "-o", str(library), *links], check=True)
    return library


@functools.cache
def operators() -> object:
    """Return the op library's operators on software tiles: bfloat16 only."""
    folder, torch_folder = Path(tempfile.mkdtemp(prefix="clipfast-amx-")), Path(torch.__file__).parent
    flags = (*SOFTWARE, "-DCLIPFAST_CUDA=none", "-DTORCH_TARGET_VERSION=0x020a000000000000ull")
    include = f"-I{torch_folder / 'include'}"
    sources = dict.fromkeys((*LIBRARY, "cuda/entry_points.cpp"), ("-O1", *flags, include))
    sources |= dict.fromkeys(KERNELS, ("-O3", *SOFTWARE))
    sources |= {"../tests/support/amx_library_on_cpu.cpp": ("-O1", *SOFTWARE)}
    _compile(folder, sources)
    links = (f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-ldl")
    torch.ops.load_library(_link(sorted(folder.glob("*.o")), folder / "software.so", *links))
    shutil.rmtree(folder)
    return getattr(torch.ops, NAMESPACE)


def _edited(folder: Path, edit: Edit, edited: str) -> Path:
    """Copy ``csrc/cpu`` to a folder and change one file of it; return the copy of ``csrc``."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc" / "cpu", tree / "cpu")
    (folder / "tests").symlink_to(ROOT / "tests")
    text = (tree / "cpu" / edited).read_text()
    changed = edit(text)
    assert changed != text, "the edit found nothing to change"
    (tree / "cpu" / edited).write_text(changed)
    return tree


@functools.cache
def _whole_kernels() -> Path:
    """Compile the kernels as they are; return the folder of the objects."""
    folder = Path(tempfile.mkdtemp(prefix="clipfast-amx-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _compile(folder, dict.fromkeys((*KERNELS, HARNESS), ("-O1", *SOFTWARE)))
    # what takes most of a compiler's time, once for all edits
    (folder / "headers.h").write_text("".join(f"#include <{name}>\n" for name in HEADERS))
    command = [compiler(), *EDITED, "-x", "c++-header", str(folder / "headers.h"), "-o", str(folder / "headers.h.gch")]
    subprocess.run(command, check=True)
    return folder


def kernels(edit: Edit | None = None, edited: str = "", seen_by: str = "") -> Run:
    """Compile the kernels; return what runs one of ``amx_on_cpu.cpp``'s functions.

    Args:
        edit: Changes the source of the file ``edited`` in ``csrc/cpu``.
        edited: The name of that file.
        seen_by: The source whose object is made of it.
    """
    folder = Path(tempfile.mkdtemp(prefix="clipfast-amx-"))
    objects = {path.name: path for path in _whole_kernels().glob("*.o")}
    if edit is not None:
        tree = _edited(folder, edit, edited)
        name = f"{Path(seen_by).stem}.o"
        headers = str(_whole_kernels() / "headers.h")
        command = [compiler(), *EDITED, "-include", headers, "-I.", "-c", seen_by, "-o", str(folder / name)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
        assert done.returncode == 0, done.stderr
        objects[name] = folder / name
    run = _runner(_link(list(objects.values()), folder / "software.so"))
    shutil.rmtree(folder)
    return run


def _runner(path: Path) -> Run:
    library = ctypes.CDLL(str(path))

    def run(name: str, *arguments: Tensor | int) -> int:
        function = getattr(library, name)
        function.restype = ctypes.c_int64
        assert all(a.is_contiguous() for a in arguments if isinstance(a, Tensor)), "tensors go by their address"
        return function(
            *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int64(a) for a in arguments)
        )

    if not run("can_run"):
        pytest.skip("this CPU lacks AVX512-BF16, which the kernels use beside the tiles")
    return run


@contextlib.contextmanager
def machine_code(edit: Edit | None = None, edited: str = "") -> Iterator[Run]:
    """Compile the kernels as the op library has them; run them, AMX's instructions emulated where there are none.

    The instructions that were emulated are counted in ``machine_code.emulated`` afterwards.

    Args:
        edit: Changes the source of the file ``edited`` in ``csrc/cpu``.
        edited: The name of that file.
    """
    folder = Path(tempfile.mkdtemp(prefix="clipfast-amx-"))
    tree = ROOT / "csrc" if edit is None else _edited(folder, edit, edited)
    _compile(folder, dict.fromkeys(KERNELS[1:], ("-O3",)) | dict.fromkeys((HARNESS, EMULATOR), ("-O2",)), tree)
    run = _runner(_link(list(folder.glob("*.o")), folder / "emulated.so"))
    shutil.rmtree(folder)
    run("begin_emulation")
    try:
        yield run
    finally:
        machine_code.emulated = run("end_emulation")


def numbers(*shape: int, seed: int, spread: float = 1.0) -> Tensor:
    """Return normal numbers of several sizes in bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(spread * torch.randn(*shape, generator=generator))
    return (torch.randn(*shape, generator=generator) * scale).bfloat16()
