"""What ``make kernels`` prints of a kernel, and what it finds wrong with one."""

from __future__ import annotations

from dataclasses import dataclass

from clipfast.benchmark.reckoning.launches import Reckoned, reckon_job
from clipfast.kernels.aot import SHARED_MEMORY, AotJob

RESOURCES = ("issue", "fp32", "alu", "special", "tensor", "shared", "memory")
# of the clocks of what binds: more than this is too much for registers that went to memory
SPILLED = 0.05

HEADER = (
    f"{'kernel':<72} {'sm':>3} {'registers':>9} {'spills':>6} {'shared':>7} {'programs':>8} "
    + " ".join(f"{resource:>8}" for resource in RESOURCES)
    + f" {'binds':>8} {'ceiling':>16}"
)


@dataclass(frozen=True)
class Row:
    """A line of the report, and the problems of its kernel, each as one sentence; none is good."""

    line: str
    problems: tuple[str, ...]


def row(job: AotJob) -> Row:
    """Compile a job, reckon it, and return its line."""
    where = f"{job.label}, sm_{job.architecture}"
    try:
        found = reckon_job(job)
    except ValueError as error:
        return Row(f"{job.label:<72} {job.architecture:>3} not reckoned", (f"{where}: {error}",))
    return Row(line(found), tuple(f"{where}: {problem}" for problem in problems(found)))


def line(found: Reckoned) -> str:
    """Return a kernel's line: of a program, the clocks by resource."""
    cost, job = found.cost, found.job
    clocks = " ".join(f"{cost.clocks[resource]:>8.0f}" for resource in RESOURCES)
    return (
        f"{job.label:<72} {job.architecture:>3} {found.registers:>9} {found.spills:>6} {found.shared_memory:>7} "
        f"{cost.resident:>8} {clocks} {cost.binding:>8} {ceiling(found):>16}"
    )


def ceiling(found: Reckoned) -> str:
    """Return the share of device memory's time, and where there are products, of the tensor cores' time."""
    shares = [f"{found.cost.ceiling():.0%} of HBM"]
    if found.cost.clocks["tensor"]:
        shares.append(f"{found.cost.ceiling('tensor'):.0%} of tensor")
    return ", ".join(shares)


def problems(found: Reckoned) -> list[str]:
    """Return why the kernel should not ship."""
    job, cost, limit = found.job, found.cost, SHARED_MEMORY[found.job.architecture]
    said = []
    if found.shared_memory > limit:
        said.append(f"{found.shared_memory} bytes of shared memory, there are {limit}")
    elif not cost.resident:
        said.append("a multiprocessor holds none of its programs")
    if cost.spilled > SPILLED * cost.clocks[cost.binding]:
        said.append(
            f"{found.spills} spills take {cost.spilled:.0f} clocks, {cost.binding} {cost.clocks[cost.binding]:.0f}"
        )
    if job.needs_hgmma and not found.hgmma:
        said.append("no HGMMA")
    return said
