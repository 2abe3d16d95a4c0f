"""The machine code of kernels in CUDA C++, compiled by nvcc without a GPU, for :func:`~.cost.reckon`."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from clipfast.benchmark.reckoning import ptx, sass
from clipfast.benchmark.reckoning.sass import Kernel


def compile_source(source: Path, architecture: str, flags: Sequence[str] = ()) -> dict[str, Kernel]:
    """Return the kernels of a ``.cu`` file by their mangled names, registers and static shared memory included.

    Args:
        source: The file.
        architecture: As nvcc has it, such as ``"80"``, ``"90a"``.
        flags: More of nvcc's flags: include folders, definitions.

    Raises:
        subprocess.CalledProcessError: nvcc refuses the file.
        FileNotFoundError: There is no nvcc.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", "-keep", f"-keep-dir={folder}", f"-arch=sm_{architecture}", "-std=c++17", "-O3"]
        target = Path(folder) / "kernels.cubin"
        subprocess.run([*command, *flags, "-o", target, source], check=True, capture_output=True, text=True)
        kernels = sass.disassemble(target.read_bytes())
        (kept,) = Path(folder).glob("*.ptx")
        for name, origin in ptx.parse(kept.read_text()).items():
            if name in kernels:
                ptx.mark_unrolled(kernels[name], origin)
        return kernels
