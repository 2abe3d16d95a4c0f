"""What all benchmarks share: sizes by scale, random inputs, and a row from its sides to the results' file.

A row is one pytest-benchmark test: its time there is clipfast's, on the device; every other side is timed in the same
rounds. ``clipfast.benchmark`` holds the clocks, the check against float64 and the file.
"""

from __future__ import annotations

import datetime
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import clipfast
from clipfast.benchmark.limits import best_of, limit_seconds, measure_limits
from clipfast.benchmark.machine import commit_name, details, folder_name, machine_name
from clipfast.benchmark.measure import Call, Measurement, Oracle
from clipfast.benchmark.results import Limits, Row, Run, write_run
from clipfast.benchmark.summary import share_of_limit
from clipfast.ops import dispatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32  # what the ops are measured in
CACHE = 512 * 2**20 if ON_GPU else 96 * 2**20  # what rotating inputs take at least: several times the last cache

# seconds of rounds that a row may take, and the fewest and most rounds
ROUNDS = {"smoke": (0.2, 2, 3), "short": (3.0, 5, 15), "full": (15.0, 9, 31)}
T = TypeVar("T")


@dataclass
class Session:
    """The run of the benchmarks that is going on; ``conftest.py`` fills it in."""

    scale: str = "short"
    results: Path | None = None
    write: Callable[[str], None] = print
    limits: Limits | None = None
    allocator: str = "default"
    rows: list[Row] = field(default_factory=list)
    clock: float = 0.0

    def read_clock(self) -> float:
        """The clock that pytest-benchmark reads: it goes on by what the device took for clipfast's call."""
        return self.clock

    def finish(self, complete: bool) -> Path | None:
        """Write what was measured; return the file."""
        if not self.rows:
            return None
        limits = best_of(self.limits, measure_limits(DEVICE))
        machine, commit = machine_name(DEVICE), commit_name(Path(__file__).parent)
        run = Run(
            machine=machine,
            device=DEVICE,
            details={"allocator": self.allocator} | details(DEVICE),
            commit=commit,
            date=datetime.date.today().isoformat(),
            scale=self.scale,
            complete=complete,
            limits=limits,
            rows=[replace(row, limit_s=limit_seconds(row, limits)) for row in self.rows],
        )
        path = self.results or Path(__file__).parent / "results"
        if path.suffix != ".json":
            name = commit if complete and self.scale != "smoke" else f"{commit}-part"
            path = path / folder_name(machine) / f"{name}.json"
        write_run(path, run)
        return path


SESSION = Session()


def by_scale(*, smoke: T, short: T, full: T, gpu: T | None = None) -> T:
    """Return what this run's scale asks for; a GPU has sizes of its own, where the CPU's would not fill it."""
    if gpu is not None and ON_GPU and SESSION.scale != "smoke":
        return gpu
    return {"smoke": smoke, "short": short, "full": full}[SESSION.scale]


def measure(
    benchmark: Any,
    row: Row,
    sides: dict[str, Call | str],
    inputs: Sequence[tuple] = ((),),
    *,
    oracle: Oracle | None = None,
    saves: bool = False,
    facts: Callable[[Row], dict[str, Any]] | None = None,
) -> Row:
    """Check, measure, print and record a row.

    Args:
        benchmark: pytest-benchmark's fixture, or None where it is not installed.
        row: As for :class:`clipfast.benchmark.measure.Measurement`, as the next four are.
        sides: Calls by name, or why one is absent.
        inputs: Sets of arguments.
        oracle: What the sides must return.
        saves: Whether sides build an autograd graph.
        facts: What the row tells beside its sides, once it is measured.
    """
    if SESSION.limits is None:
        SESSION.limits = measure_limits(DEVICE)
    measurement = Measurement(row, sides, inputs, oracle=oracle, device=DEVICE, saves=saves)
    if benchmark is not None and benchmark.disabled:
        measurement.round()
        return measurement.row()

    def round_() -> None:
        SESSION.clock += measurement.round()

    rounds = measurement.rounds(*ROUNDS[SESSION.scale])
    if benchmark is None:
        for _ in range(rounds):
            round_()
    else:
        benchmark.pedantic(round_, rounds=rounds, warmup_rounds=0)
    row = measurement.row()
    row = replace(row, limit_s=limit_seconds(row, SESSION.limits), facts=row.facts | (facts(row) if facts else {}))
    if benchmark is not None:
        benchmark.extra_info.update({name: side.seconds for name, side in row.sides.items()})
    SESSION.rows.append(row)
    for line in lines_of(row):
        SESSION.write(line)
    return row


def lines_of(row: Row) -> list[str]:
    """Return a row as text: a line a side."""
    lines = ["", row.name]
    first = next(iter(row.sides))
    for name, side in row.sides.items():
        line = f"  {name:<30} {side.seconds * 1e3:10.4f} ms {row.items / side.seconds:12,.0f} {row.unit}/s"
        line += f" {row.ratio(name, first):6.2f} × {first}'s time"
        if (share := share_of_limit(row, name)) is not None:
            line += f", {share:4.0%} of the limit"
        if side.peak_bytes is not None:
            line += f", {side.peak_bytes / 1e6:,.1f} MB"
        if side.error is not None:
            line += f", error {side.error:.1e}"
        lines.append(line)
    return lines + [f"  {name:<30} {reason}" for name, reason in row.missing.items()]


def op_facts(op: str, *args: Any, backward: bool, **kwargs: Any) -> dict[str, Any]:
    """Return what a row of one op tells of clipfast's call: its shape class, and which implementation served it."""
    tensors = [a.detach().requires_grad_(backward) if isinstance(a, Tensor) else a for a in args]
    with torch.set_grad_enabled(backward):
        return {
            "shape_class": dispatch.shape_class(op, *tensors, **kwargs),
            "backward": backward,
            "served_by": clipfast.explain(op, *tensors, **kwargs).splitlines()[0].removeprefix(f"{op}: "),
        }


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name as results have it."""
    return str(dtype).removeprefix("torch.")


def rotating(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Return sets of random inputs, more of them than a cache holds."""
    first = make()
    size = max(1, sum(t.numel() * t.element_size() for t in first))
    most = 2 if SESSION.scale == "smoke" else 63
    return [first, *(make() for _ in range(min(most, CACHE // size)))]


def with_backward(function: Callable[..., object], grads: tuple[Tensor, ...]) -> Callable[..., object]:
    """Return a function that gives what ``function`` gives, and the gradients of all of its inputs."""

    def both(*inputs: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, leaves, grads))

    return both


def in_direction(sides: dict[str, Call | str], grads: tuple[Tensor, ...] | None) -> dict[str, Call | str]:
    """Return the sides with their backward passes for some gradients; for None as in inference, without any."""

    def one(side: Call | str) -> Call | str:
        if isinstance(side, str):
            return side
        return torch.no_grad()(side) if grads is None else with_backward(side, grads)

    return {name: one(side) for name, side in sides.items()}


def exactly(
    function: Callable[..., object], inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...] | None = None
) -> list[Tensor]:
    """Return the float64 results of a function that is written in PyTorch's operators or clipfast's ops."""
    inputs = tuple(t.double() if t.is_floating_point() else t for t in inputs)
    with clipfast.backend("reference"), clipfast.exact_shortcuts(False):
        if grads is not None:
            return with_backward(function, tuple(g.double() for g in grads))(*inputs)
        with torch.no_grad():
            results = function(*inputs)
    return [results] if isinstance(results, Tensor) else list(results)


def on_backend(backend: str, function: Callable[..., object]) -> Callable[..., object]:
    """Return the function with its ops forced to one backend."""

    def run(*arguments: object) -> object:
        with clipfast.backend(backend):
            return function(*arguments)

    return run


def dense(function: Callable[..., object]) -> Callable[..., object]:
    """Return the function with every token computed."""

    def run(*arguments: object) -> object:
        with clipfast.exact_shortcuts(False):
            return function(*arguments)

    return run


def absent(*modules: str, gpu: bool = False) -> str | None:
    """Return why a rival that needs these modules cannot be measured here, or None."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            return "not installed"
    return "needs a GPU" if gpu and not ON_GPU else None
