"""Kernels compiled ahead of time, without a GPU: what each of them costs a streaming multiprocessor.

A kernel family lists every configuration that its launcher can choose in ``aot_jobs()``. Compiled for an
architecture, a job tells the registers, spills, shared memory and tensor-core instructions of the machine code.
Triton's compiler accepts a kernel that asks for more shared memory than there is, and one that spills: both are
found here, and not by the first user of a card.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# A100, H100 and H200, B200: what a block may use of a multiprocessor's shared memory, in bytes
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class AotJob:
    """One configuration of a kernel.

    Attributes:
        kernel: The function under ``@triton.jit``.
        signature: The type of every argument that is not a constexpr, such as ``"*bf16"``, ``"i64"``, ``"fp32"``.
        constexprs: The value of every constexpr.
        num_warps: Warps a program.
        num_stages: Stages of software pipelining.
        label: What a table calls it.
        architectures: Compute capabilities × 10 that the launcher chooses it for.
        divisible_by_16: The integer arguments that the launcher finds divisible by 16, such as strides; pointers
            always are.
        needs_hgmma: Whether it must use Hopper's warp-group tensor-core instructions on sm_90.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, object]
    num_warps: int
    num_stages: int
    label: str
    architectures: tuple[int, ...] = (80, 90, 100)
    divisible_by_16: tuple[str, ...] = ()
    needs_hgmma: bool = False


@dataclass(frozen=True)
class Compiled:
    """What a job costs on one architecture.

    Attributes:
        label: The job's.
        architecture: The compute capability × 10.
        registers: Registers a thread.
        spills: Loads and stores of local memory in the machine code (``LDL``, ``STL``).
        shared_memory: Bytes of shared memory a program.
        hmma, hgmma, tcgen05: Tensor-core instructions of Ampere's, Hopper's and Blackwell's kind.
        problems: Why the kernel should not ship, each as one sentence; none is good.
    """

    label: str
    architecture: int
    registers: int
    spills: int
    shared_memory: int
    hmma: int
    hgmma: int
    tcgen05: int
    problems: tuple[str, ...]


def discover() -> dict[str, list[AotJob]]:
    """Return the jobs of every kernel family in this folder that has ``aot_jobs()``, by the family's name."""
    package = importlib.import_module(__package__)
    families = {}
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__package__}.{found.name}")
        if hasattr(module, "aot_jobs"):
            families[found.name] = module.aot_jobs()
    return families


def compile_job(job: AotJob, architecture: int) -> Compiled:
    """Compile a job for one architecture.

    Raises:
        ValueError: The signature and the constexprs do not name every argument of the kernel once.
        RuntimeError: Triton runs in its interpreter (``TRITON_INTERPRET=1``), which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_job: got TRITON_INTERPRET=1 in the environment, expected it unset")
    names = job.kernel.arg_names
    if sorted(names) != sorted([*job.signature, *job.constexprs]):
        wrong = set(names) ^ set(job.signature).union(job.constexprs) or set(job.signature) & set(job.constexprs)
        raise ValueError(f"compile_job({job.label}): got arguments that do not fit the kernel's: {sorted(wrong)}")
    aligned = {n for n, kind in job.signature.items() if kind.startswith("*")}.union(job.divisible_by_16)
    source = ASTSource(
        fn=job.kernel,
        signature={n: job.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in job.constexprs.items()},
        # what the launcher would find out about these arguments at run time
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage, code = _disassemble(kernel.asm["cubin"])
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, f"cuobjdump names no registers: {usage!r}"
    counts = {
        "spills": _count(r"\b(?:LDL|STL)\b", code),
        "shared_memory": int(kernel.metadata.shared),
        "hmma": _count(r"\bHMMA\b", code),
        "hgmma": _count(r"\bHGMMA\b", code),
        "tcgen05": _count(r"\bUTC\w*MMA\b", code),
    }
    problems = _problems(job, architecture, counts)
    return Compiled(job.label, architecture, int(found[1]), **counts, problems=problems)


def _problems(job: AotJob, architecture: int, counts: dict[str, int]) -> tuple[str, ...]:
    problems = []
    if counts["spills"]:
        problems.append(f"{counts['spills']} spills")
    if counts["shared_memory"] > SHARED_MEMORY[architecture]:
        problems.append(f"{counts['shared_memory']} bytes of shared memory, there are {SHARED_MEMORY[architecture]}")
    if job.needs_hgmma and architecture == 90 and not counts["hgmma"]:
        problems.append("no HGMMA")
    return tuple(problems)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the resource usage and the machine code, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ([tools / "cuobjdump", "--dump-resource-usage"], [tools / "nvdisasm"])
        usage, code = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return usage, code


def _count(pattern: str, code: str) -> int:
    return len(re.findall(pattern, code))
