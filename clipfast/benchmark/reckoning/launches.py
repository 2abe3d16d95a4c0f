"""The cost of a Triton kernel as it is launched, and of a call that launches several."""

from __future__ import annotations

from dataclasses import dataclass

from clipfast.benchmark.reckoning import ptx, sass
from clipfast.benchmark.reckoning.cards import CARDS, LATENCY, Card
from clipfast.benchmark.reckoning.cost import Cost, reckon
from clipfast.kernels.aot import AotJob


@dataclass(frozen=True)
class Reckoned:
    """A launch, and what it costs.

    Attributes:
        job: The launch.
        registers: Registers a thread.
        shared_memory: Bytes a program.
        columns: Columns of tensor memory a program.
        spills: Loads and stores of local memory in the machine code.
        hgmma: Hopper's tensor-core instructions in it.
        cost: Of a program.
    """

    job: AotJob
    registers: int
    shared_memory: int
    columns: int
    spills: int
    hgmma: int
    cost: Cost

    @property
    def card(self) -> Card:
        """The card that it is reckoned for."""
        return CARDS[self.job.architecture]

    @property
    def seconds(self) -> float:
        """The time at best: the binding resource's on the multiprocessors that have programs, or the waits of one."""
        card = self.card
        busy = min(self.job.programs, card.multiprocessors)
        per_program = max(clocks for resource, clocks in self.cost.clocks.items() if resource != "memory")
        memory = self.job.bytes_moved() / card.memory
        alone = (self.cost.clocks["issue"] + self.cost.waits * LATENCY) / card.clock
        turns = -(-self.job.programs // (card.multiprocessors * max(self.cost.resident, 1)))
        return max(self.job.programs * per_program / busy / card.clock, memory, alone * turns)


def reckon_job(job: AotJob) -> Reckoned:
    """Compile a launch and reckon it.

    Raises:
        ValueError: The kernel's machine code has other loops than ``aot_work`` gives.
    """
    compiled = job.compile()
    (kernel,) = sass.disassemble(compiled.asm["cubin"]).values()
    (source,) = ptx.parse(compiled.asm["ptx"]).values()
    ptx.mark_unrolled(kernel, source)
    shared, columns = int(compiled.metadata.shared), int(getattr(compiled.metadata, "tmem_size", 0) or 0)
    moved = job.bytes_moved() / job.programs
    cost = reckon(kernel, CARDS[job.architecture], job.num_warps, job.work().loops, moved, shared, columns)
    names = [instruction.base for instruction in kernel.instructions]
    spills = names.count("LDL") + names.count("STL")
    return Reckoned(job, kernel.registers, shared, columns, spills, names.count("HGMMA"), cost)
