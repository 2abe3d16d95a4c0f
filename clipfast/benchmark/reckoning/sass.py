"""NVIDIA's machine code, read from nvdisasm's text: instructions, control flow, and how often each of them runs.

How often a loop runs is not in the machine code: whoever asks gives the trips of the source's loops, and they must be
as many, nested alike. A conditional branch forward counts as if both sides ran; code that only a call reaches (the slow
path of a division) does not count.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol


class Trips(Protocol):
    """How often a loop's body runs each time that it is entered, and the loops inside."""

    @property
    def trips(self) -> float:
        """Trips of the loop."""

    @property
    def inside(self) -> Sequence[Trips]:
        """The loops in its body."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, the predicate before it, its name with all suffixes, its operands."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def base(self) -> str:
        """The name without suffixes."""
        return self.name.partition(".")[0]


@dataclass
class Nest:
    """A loop in the machine code.

    Attributes:
        start: The address where it starts.
        blocks: The blocks in it.
        inside: The loops inside.
        unrolled: How many trips of the source's loop one of its own is.
    """

    start: int
    blocks: frozenset[int]
    inside: list[Nest] = field(default_factory=list)
    unrolled: int = 1

    def __str__(self) -> str:
        return f"{self.start:#x}" + (f"({', '.join(map(str, self.inside))})" if self.inside else "")


@dataclass
class Kernel:
    """A kernel's machine code.

    Attributes:
        name: Its symbol.
        instructions: In the order of addresses.
        labels: The addresses of the labels.
        registers: A thread's.
        shared: Bytes of shared memory that the code asks for; what the launch adds is not in it.
    """

    name: str
    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int = 0
    shared: int = 0

    @cached_property
    def blocks(self) -> dict[int, list[Instruction]]:
        """The blocks that the first instruction reaches without a call, by the address of their first instruction."""
        starts = {self.instructions[0].address, *self.labels.values()}
        parts: list[list[Instruction]] = [[]]
        for instruction in self.instructions:
            if parts[-1] and instruction.address in starts:
                parts.append([])
            parts[-1].append(instruction)
            if _branches(instruction) or instruction.base in ("EXIT", "RET"):
                parts.append([])
        found = [part for part in parts if part]
        following = {a[0].address: b[0].address for a, b in itertools.pairwise(found)}
        whole = {part[0].address: part for part in found}
        reached, left = {}, [found[0][0].address]
        while left:
            block = left.pop()
            if block not in reached:
                reached[block] = self._next(whole[block], following.get(block))
                left += reached[block]
        self._edges = reached
        return {start: whole[start] for start in sorted(reached)}

    def _next(self, block: list[Instruction], following: int | None) -> list[int]:
        last = block[-1]
        targets, falls = [], True
        if _branches(last):
            label = _TARGET.search(last.operands)
            if label is None:
                raise ValueError(f"{self.name}: an indirect branch at {last.address:#x}, expected none")
            # where lanes diverge in front of a shuffle: never in these kernels
            if ".DIV" not in last.name:
                targets.append(self.labels[label[0]])
            conditional = last.predicate or re.match(r"!?U?P\w+,", last.operands) or ".DIV" in last.name
            falls = bool(conditional)
        elif last.base in ("EXIT", "RET"):
            falls = bool(last.predicate)
        if falls and following is not None:
            targets.append(following)
        return targets

    @cached_property
    def loops(self) -> list[Nest]:
        """The outermost loops, in the order of their addresses.

        Raises:
            ValueError: Control flow has a cycle that is not a loop with one entry.
        """
        blocks = self.blocks
        first = min(blocks)
        before: dict[int, set[int]] = {block: set() for block in blocks}
        for block, targets in self._edges.items():
            for target in targets:
                before[target].add(block)
        dominators = _dominators(first, blocks, before)
        bodies: dict[int, set[int]] = {}
        for block, targets in self._edges.items():
            for target in targets:
                if target in dominators[block]:
                    bodies.setdefault(target, set()).update(_body(target, block, before))
        _no_other_cycle(self.name, self._edges, dominators)
        found = (Nest(start, frozenset(body)) for start, body in bodies.items() if not self._waits(body))
        nests = sorted(found, key=lambda nest: -len(nest.blocks))
        outermost: list[Nest] = []
        for nest in nests:
            around = [other for other in nests if other is not nest and nest.start in other.blocks]
            inner = min(around, key=lambda other: len(other.blocks), default=None)
            (inner.inside if inner else outermost).append(nest)
        for nest in nests:
            nest.inside.sort(key=lambda inner: inner.start)
        return sorted(outermost, key=lambda nest: nest.start)

    def _waits(self, body: set[int]) -> bool:
        """Return whether a loop only asks again whether something is ready; it counts as one trip."""
        inside = [instruction for block in body for instruction in self.blocks[block]]
        return len(inside) <= 8 and any(re.search(r"TRYWAIT|FIND_AND_SET", i.name) for i in inside)

    def runs(self, trips: Sequence[Trips]) -> list[tuple[Instruction, float]]:
        """Return every instruction that is reached, and how often a warp runs it.

        Args:
            trips: Of the outermost loops, in order.

        Raises:
            ValueError: There are more loops or fewer, or they are nested otherwise.
        """
        often = dict.fromkeys(self.blocks, 1.0)
        self._multiply(often, self.loops, trips)
        return [(i, often[start]) for start, block in self.blocks.items() for i in block if i.base != "NOP"]

    def _multiply(self, often: dict[int, float], loops: Sequence[Nest], trips: Sequence[Trips]) -> None:
        if len(loops) != len(trips):
            found = ", ".join(map(str, self.loops)) or "none"
            raise ValueError(f"{self.name}: found {len(loops)} loops where {len(trips)} were expected; all: {found}")
        for nest, loop in zip(loops, trips, strict=True):
            # what is left of an unrolled loop stands behind it, and counts once
            trips_here = max(loop.trips - (nest.unrolled - 1), 0) / nest.unrolled
            for block in nest.blocks:
                often[block] *= trips_here
            self._multiply(often, nest.inside, loop.inside)


def _branches(instruction: Instruction) -> bool:
    # the compiler also leaves loops by a call that never returns
    return instruction.base in ("BRA", "BRX") or (
        instruction.name == "CALL.REL.NOINC" and _TARGET.search(instruction.operands) is not None
    )


def _dominators(first: int, blocks: Iterable[int], before: dict[int, set[int]]) -> dict[int, set[int]]:
    every = set(blocks)
    dominators = {block: {first} if block == first else set(every) for block in every}
    changed = True
    while changed:
        changed = False
        for block in sorted(every - {first}):
            new = set.intersection(*(dominators[b] for b in before[block])) | {block}
            changed |= new != dominators[block]
            dominators[block] = new
    return dominators


def _body(start: int, end: int, before: dict[int, set[int]]) -> set[int]:
    body, left = {start}, [end]
    while left:
        block = left.pop()
        if block not in body:
            body.add(block)
            left += before[block]
    return body


def _no_other_cycle(name: str, edges: dict[int, list[int]], dominators: dict[int, set[int]]) -> None:
    forward = {block: [t for t in targets if t not in dominators[block]] for block, targets in edges.items()}
    entered: dict[int, int] = {}
    for target in (t for targets in forward.values() for t in targets):
        entered[target] = entered.get(target, 0) + 1
    left = [block for block in forward if not entered.get(block)]
    done = 0
    while left:
        done += 1
        for target in forward[left.pop()]:
            entered[target] -= 1
            if not entered[target]:
                left.append(target)
    if done != len(forward):
        raise ValueError(f"{name}: control flow has a cycle with two entries, expected loops with one")


_TARGET = re.compile(r"\.L_x?_?\w+")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+)")
_LABEL = re.compile(r"^(\.L_x?_?\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")


def parse(code: str) -> dict[str, Kernel]:
    """Return the kernels in ``nvdisasm -c``'s text, by their symbols."""
    kernels: dict[str, Kernel] = {}
    kernel, waiting = Kernel("", [], {}), []
    for line in code.splitlines():
        if section := _SECTION.match(line):
            kernel = kernels.setdefault(section[1], Kernel(section[1], [], {}))
        elif label := _LABEL.match(line.strip()):
            waiting.append(label[1])
        elif found := _INSTRUCTION.match(line):
            address = int(found[1], 16)
            kernel.labels.update(dict.fromkeys(waiting, address))
            waiting = []
            kernel.instructions.append(Instruction(address, (found[2] or "").strip(), found[3], found[4]))
    return {name: found for name, found in kernels.items() if found.instructions}


def disassemble(cubin: bytes) -> dict[str, Kernel]:
    """Return the kernels of a cubin with their registers, by the tools that come with Triton."""
    kernels = parse(_tool("nvdisasm", cubin, "-c"))
    for name, registers, shared in _resources(_tool("cuobjdump", cubin, "--dump-resource-usage")):
        if name in kernels:
            kernels[name].registers, kernels[name].shared = registers, shared
    return kernels


def _resources(usage: str) -> Iterator[tuple[str, int, int]]:
    for found in re.finditer(r"Function ([\w$.]+):\s+REG:(\d+).*?SHARED:(\d+)", usage):
        yield found[1], int(found[2]), int(found[3])


def _tool(name: str, cubin: bytes, option: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout
