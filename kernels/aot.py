"""Kernels compiled ahead of time, without a GPU, exactly as their launchers would have them compiled.

A kernel family lists calls of its own launchers in ``aot_calls()``. They run with tensors without memory and a driver
without a card; Triton's own binder sees the arguments, specialises them, and is stopped where it would compile. What it
would have compiled is the job: pointers and strides divisible by 16, integers that are 1, constants, options. So
nothing that is compiled here can differ from what is launched.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from clipfast.kernels.card import Card, pretend

# what a block may use of a multiprocessor's shared memory, in bytes, by compute capability × 10
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
# A100, A10, L40S, H100, B200, RTX 5090
MULTIPROCESSORS = {80: 108, 86: 72, 89: 142, 90: 132, 100: 148, 120: 170}


@dataclass(frozen=True)
class Call:
    """A call of a launcher.

    Attributes:
        label: What a table calls it.
        run: Calls the launcher with tensors of :func:`tensor`.
        half: Whether its products are in 16 bits: on sm_90 they must use warp-group tensor-core instructions.
        quick: Whether it is one of the few that a short look compiles.
    """

    label: str
    run: Callable[[], object]
    half: bool = False
    quick: bool = False


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel.

    Attributes:
        trips: How often its body runs each time that it is entered, on average over programs.
        inside: The loops in its body, in order.
    """

    trips: float
    inside: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a kernel's machine code does not tell. A kernel's module gives it by ``aot_work(name, values)``.

    Attributes:
        loops: The outermost loops, in order.
        parts: Of tensors of which only a part is read or written, which part.
    """

    loops: tuple[Loop, ...] = ()
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AotJob:
    """One launch of a kernel, as Triton would compile it.

    Attributes:
        kernel: The function under ``@triton.jit``.
        signature: The type of every argument that is not a constant, such as ``"*bf16"``, ``"i64"``, ``"fp32"``.
        constexprs: The value of every constexpr, and of every argument that specialisation made one.
        attributes: What the launcher found out about other arguments, such as ``[["tt.divisibility", 16]]``.
        num_warps: Warps a program.
        num_stages: Stages of software pipelining.
        label: What a table calls it.
        architecture: The compute capability × 10 that it was launched for.
        grid: Programs, by axis.
        values: The arguments that are numbers, the constexprs, and ``"grid"``.
        sizes: The bytes of every tensor among the arguments; 0 for a second name of the same memory.
        needs_hgmma: Whether it must use Hopper's warp-group tensor-core instructions on sm_90.
        quick: Whether a short look compiles it.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[str, Any]
    num_warps: int
    num_stages: int
    label: str
    architecture: int
    grid: tuple[int, ...]
    values: Mapping[str, Any]
    sizes: Mapping[str, int]
    needs_hgmma: bool = False
    quick: bool = False

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.kernel.__name__

    @property
    def family(self) -> str:
        """The module that the kernel is in, such as ``layer_norm``."""
        return self.kernel.fn.__module__.rpartition(".")[2]

    @property
    def programs(self) -> int:
        """Programs in the grid."""
        return functools.reduce(int.__mul__, self.grid, 1)

    def work(self) -> Work:
        """Return the trips of the kernel's loops and its traffic, by the module that the kernel is in.

        Raises:
            LookupError: The module has no ``aot_work``.
        """
        module = sys.modules[self.kernel.fn.__module__]
        if not hasattr(module, "aot_work"):
            raise LookupError(f"{module.__name__} has no aot_work(name, values): the trips of {self.name} are unknown")
        return module.aot_work(self.name, self.values)

    def bytes_moved(self) -> float:
        """Return the bytes of device memory that the launch moves, if every tensor is read or written once."""
        parts = self.work().parts
        return sum(size * parts.get(name, 1) for name, size in self.sizes.items())

    def source(self) -> ASTSource:
        """Return what Triton compiles."""
        names = self.kernel.arg_names
        return ASTSource(
            fn=self.kernel,
            signature={name: self.signature.get(name, "constexpr") for name in names},
            constexprs={(names.index(name),): value for name, value in self.constexprs.items()},
            attrs={(names.index(name),): value for name, value in self.attributes.items()},
        )

    def options(self) -> dict[str, int]:
        """Return the options that it is compiled with."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    def compile(self) -> Any:
        """Return Triton's compiled kernel.

        Raises:
            ValueError: The signature and the constexprs do not name every argument of the kernel once.
        """
        names = self.kernel.arg_names
        if sorted(names) != sorted([*self.signature, *self.constexprs]):
            wrong = set(names) ^ set(self.signature).union(self.constexprs)
            wrong = wrong or set(self.signature) & set(self.constexprs)
            raise ValueError(f"compile({self.label}): got arguments that do not fit the kernel's: {sorted(wrong)}")
        target = GPUTarget("cuda", self.architecture, 32)
        return triton.compile(self.source(), target=target, options=self.options())


def tensor(*shape: int, dtype: str) -> Tensor:
    """Return a tensor without memory; Triton takes its address as aligned, as that of any tensor of its own is."""
    return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")


_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i32": torch.int32}


def capture(call: Call, architecture: int, multiprocessors: int | None = None) -> list[AotJob]:
    """Return what a call launches on an architecture, in order.

    Args:
        call: The call.
        architecture: The compute capability × 10.
        multiprocessors: The card's; by default those of ``MULTIPROCESSORS``.

    Raises:
        RuntimeError: Triton runs in its interpreter (``TRITON_INTERPRET=1``), which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("capture: got TRITON_INTERPRET=1 in the environment, expected it unset")
    capability = divmod(architecture, 10)
    with pretend(Card(capability, multiprocessors or MULTIPROCESSORS[architecture])), _launches(architecture) as seen:
        call.run()
    jobs = []
    for launch in seen:
        kernel = launch["kernel"]
        tensors = {n: v for n, v in launch["arguments"].items() if isinstance(v, Tensor)}
        constants = launch["constants"]
        values = {n: v for n, v in launch["arguments"].items() if n not in tensors} | {"grid": launch["grid"]}
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        jobs.append(
            AotJob(
                kernel,
                {n: t for n, t in launch["signature"].items() if t != "constexpr"},
                constants,
                launch["attributes"],
                launch["num_warps"],
                launch["num_stages"],
                label=f"{call.label}: {name}",
                architecture=architecture,
                grid=launch["grid"],
                values=MappingProxyType(values),
                sizes=_sizes(tensors),
                needs_hgmma=call.half and architecture == 90,
                quick=call.quick,
            )
        )
    return jobs


@functools.cache
def discover(architectures: tuple[int, ...] = (80, 90, 100, 120)) -> dict[str, list[AotJob]]:
    """Return what is launched by every module that has ``aot_calls()``, by the module of the kernel; each job once."""
    package = importlib.import_module(__package__)
    families: dict[str, list[AotJob]] = {}
    seen: set[str] = set()
    for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{__package__}.{found.name}")
        for architecture in architectures:
            for call in module.aot_calls() if hasattr(module, "aot_calls") else ():
                for job in capture(call, architecture):
                    key = specialisation(job)
                    if key not in seen:
                        seen.add(key)
                        families.setdefault(job.family, []).append(job)
    return families


def specialisation(job: AotJob) -> str:
    """Return what tells a job's machine code from every other's."""
    parts = (job.signature, job.constexprs, job.attributes, job.options())
    told = ";".join(",".join(f"{k}={part[k]}" for k in sorted(part)) for part in parts)  # type: ignore[index]
    return f"{job.kernel.fn.__module__}.{job.name} {job.architecture} {told}"


def _sizes(tensors: dict[str, Tensor]) -> Mapping[str, int]:
    sizes, known = {}, set()
    for name, value in tensors.items():
        memory = value.untyped_storage()._cdata
        sizes[name] = 0 if memory in known else value.numel() * value.element_size()
        known.add(memory)
    return MappingProxyType(sizes)


class _Driver:
    """What Triton's launcher asks a driver; each architecture is a device of its own, with caches of its own."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)


@contextlib.contextmanager
def _launches(architecture: int) -> Iterator[list[dict[str, Any]]]:
    """Collect what is launched, and launch nothing."""
    seen: list[dict[str, Any]] = []
    jit = triton.runtime.jit.JITFunction
    run, driver, hook = jit.run, triton.runtime.driver, triton.knobs.runtime.jit_cache_hook
    active = driver._active

    def recorded(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        named = {name: value for name, value in options.items() if name in kernel.arg_names}
        bound = inspect.signature(kernel.fn).bind(*args, **named)
        bound.apply_defaults()
        seen.append({"kernel": kernel, "grid": tuple(grid), "arguments": dict(bound.arguments)})
        return run(kernel, *args, grid=grid, warmup=warmup, **options)

    def stop(**found: Any) -> bool:
        told, names = found["compile"], seen[-1]["kernel"].arg_names
        seen[-1] |= {name: told[name] for name in ("signature", "num_warps", "num_stages")}
        seen[-1]["constants"] = {names[place[0]]: value for place, value in told["constants"].items()}
        seen[-1]["attributes"] = {names[place[0]]: value for place, value in told["configs"][0].items()}
        # compile nothing
        return True

    jit.run, driver._active, triton.knobs.runtime.jit_cache_hook = recorded, _Driver(architecture), stop
    try:
        yield seen
    finally:
        jit.run, driver._active, triton.knobs.runtime.jit_cache_hook = run, active, hook
