"""PTX, read for its loops: the assembler may have unrolled them, and then one trip in machine code is several.

Both have the same loads, stores and products a trip. As many times as the machine code's loop has more of them, as
often is it unrolled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from clipfast.benchmark.reckoning.sass import Instruction, Kernel, Nest

_ENTRY = re.compile(r"\.entry\s+([\w$]+)")
_LABEL = re.compile(r"^\$(L__BB\w+):")
_INSTRUCTION = re.compile(r"^(@!?%\w+\s+)?([a-z][\w.:]*)\s*(.*?);")
# alike in both: what is worth a count, in PTX and in machine code
_IN_PTX = re.compile(r"(ld|st)\.(volatile\.)?global|cp\.async\.c[ag]|wgmma\.mma_async|mma\.sync")
_IN_SASS = ("LDG", "STG", "LDGSTS", "HGMMA", "HMMA")


def parse(code: str) -> dict[str, Kernel]:
    """Return the kernels of a PTX module, with as much of their instructions as control flow needs."""
    kernels: dict[str, Kernel] = {}
    kernel, waiting = Kernel("", [], {}), []
    for raw in code.splitlines():
        line = raw.strip().lstrip("{ \t")
        if entry := _ENTRY.search(line):
            kernel = kernels.setdefault(entry[1], Kernel(entry[1], [], {}))
        elif label := _LABEL.match(line):
            waiting.append(f".{label[1]}")
        elif found := _INSTRUCTION.match(line):
            address = len(kernel.instructions)
            kernel.labels.update(dict.fromkeys(waiting, address))
            waiting = []
            predicate, name, operands = (found[1] or "").strip(), found[2], found[3]
            target = re.search(r"\$(L__BB\w+)", operands)
            if name.startswith("bra") and target:
                name, operands = "BRA", f".{target[1]}"
            elif name == "ret":
                name = "EXIT"
            kernel.instructions.append(Instruction(address, predicate, name, operands))
    return {name: found for name, found in kernels.items() if found.instructions}


def mark_unrolled(machine: Kernel, source: Kernel) -> None:
    """Find how often each loop of the machine code is unrolled, where it has as many loops as the source."""
    _mark(machine, machine.loops, source, source.loops)


def _mark(machine: Kernel, loops: Sequence[Nest], source: Kernel, of: Sequence[Nest]) -> None:
    if len(loops) != len(of):
        return
    for nest, origin in zip(loops, of, strict=True):
        theirs = sum(bool(_IN_PTX.match(i.name)) for i in _own(source, origin))
        ours = sum(i.base in _IN_SASS for i in _own(machine, nest))
        nest.unrolled = max(1, round(ours / theirs)) if theirs else 1
        _mark(machine, nest.inside, source, origin.inside)


def _own(kernel: Kernel, nest: Nest) -> list[Instruction]:
    """Return the instructions of a loop that are in none of the loops inside."""
    blocks = nest.blocks.difference(*(inner.blocks for inner in nest.inside))
    return [instruction for block in blocks for instruction in kernel.blocks[block]]
