"""Clocks a program, by resource: every instruction's, times how often it runs, over what a multiprocessor does a clock.

A resource's clocks are what it takes if nothing else holds it up. The largest of them binds, and the share that device
memory (or the tensor cores) has of it is the ceiling: what is reached at best, with enough programs to hide every wait.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from clipfast.benchmark.reckoning.cards import COLUMNS, REGISTERS, RESERVED, SHARED, SPECIAL, Card
from clipfast.benchmark.reckoning.sass import Instruction, Kernel, Trips

_CLASSES = {
    "tensor": "HMMA HGMMA QGMMA IMMA",
    "special": "MUFU F2F F2I I2F FRND POPC FLO",
    "fp32": "FFMA FADD FMUL FFMA2 FADD2 FMUL2 HFMA2 HADD2 HMUL2 FSWZADD IMAD",
    "alu": "FMNMX FMNMX3 FSEL FSETP FSET FCHK HMNMX2 HSETP2 HSET2 VHMNMX PRMT SEL LOP3 LOP SHF SHL SHR LEA IADD3 IADD "
    "IADD64 ISETP IMNMX VIMNMX VIMNMX3 VIADD VIADDMNMX PLOP3 IABS I2FP F2FP I2IP SGXT BMSK LOP32I MOV P2R R2P CS2R",
    "shared": "LDS STS LDSM STSM ATOMS MOVM",
    "shuffle": "SHFL",
    "global load": "LDG LD LDGSTS UTMALDG",
    "global store": "STG ST UTMASTG RED ATOMG",
    "local": "LDL STL",
    "constant": "LDC ULDC LDCU",
    "tensor memory": "LDTM STTM",
    "waiting": "BAR WARPSYNC MEMBAR FENCE SYNCS WARPGROUP BSYNC BSSY ERRBAR CCTL DEPBAR LDGDEPBAR UTCBAR ACQBULK "
    "UTCATOMSWS",
    "branch": "BRA EXIT CALL RET BRX",
}
_CLASS_OF = {name: told for told, names in _CLASSES.items() for name in names.split()}
CLASSES = (*_CLASSES, "others")


def class_of(instruction: Instruction) -> str:
    """Return what kind of instruction it is, one of ``CLASSES``."""
    base = instruction.base
    if re.fullmatch(r"UTC\w*MMA", base):
        return "tensor"
    return _CLASS_OF.get(base, "others")


@dataclass(frozen=True)
class Cost:
    """What a kernel costs a multiprocessor, each figure for one program.

    Attributes:
        instructions: Of a warp, by class.
        clocks: By resource: ``issue``, ``fp32``, ``alu``, ``special``, ``tensor``, ``shared``, ``memory``.
        spilled: Clocks of shared memory's path that local memory takes, of ``clocks["shared"]``.
        resident: Programs that a multiprocessor holds.
        waits: Dependent loads from device memory, one behind the other, if none is asked for early.
    """

    instructions: Counter[str]
    clocks: dict[str, float]
    spilled: float
    resident: int
    waits: float

    @property
    def binding(self) -> str:
        """The resource that takes longest."""
        return max(self.clocks, key=lambda resource: self.clocks[resource])

    def ceiling(self, resource: str = "memory") -> float:
        """Return the share of a resource's clocks in the binding one's."""
        return self.clocks[resource] / self.clocks[self.binding]


def reckon(
    kernel: Kernel,
    card: Card,
    warps: int,
    loops: Sequence[Trips] = (),
    moved: float = 0.0,
    shared_memory: int | None = None,
    columns: int = 0,
) -> Cost:
    """Return what a program of a kernel costs.

    Args:
        kernel: The machine code.
        card: The card.
        warps: Warps a program.
        loops: The trips of the outermost loops, in the order of their addresses.
        moved: Bytes of device memory that a program moves.
        shared_memory: Bytes a program; by default what the code asks for.
        columns: Columns of tensor memory a program.

    Raises:
        ValueError: The loops are not those of the machine code, or a product's shape is unknown.
    """
    counted: Counter[str] = Counter()
    clocks = dict.fromkeys(("issue", "fp32", "alu", "special", "tensor", "shared"), 0.0)
    spilled = waits = 0.0
    runs = kernel.runs(loops)
    descriptors = _Descriptors(kernel)
    seen: set[float] = set()
    for instruction, often in runs:
        told = class_of(instruction)
        counted[told] += often  # type: ignore[assignment]  # trips may be averages
        times = often * warps
        clocks["issue"] += times / 4
        if told in ("fp32", "alu"):
            # 32-bit multiplication of integers and packed pairs take two turns
            turns = 2 if instruction.base in ("IMAD", "FFMA2", "FADD2", "FMUL2") else 1
            clocks[told] += times * 32 * turns / getattr(card, told)
        elif told == "special":
            clocks["special"] += times * 32 / SPECIAL
        elif told == "tensor":
            clocks["tensor"] += often * _tensor(instruction, card, warps, descriptors)
        bytes_ = often * _shared_bytes(instruction, told, warps)
        clocks["shared"] += bytes_ / SHARED
        spilled += bytes_ / SHARED if told == "local" else 0
        if told == "global load" and often not in seen:
            # the loads of one body are on their way together
            seen.add(often)
            waits += often
    clocks["memory"] = moved / card.memory_a_clock
    used = kernel.shared if shared_memory is None else shared_memory
    return Cost(counted, clocks, spilled, resident(card, kernel.registers, warps, used, columns), waits)


def resident(card: Card, registers: int, warps: int, shared_memory: int, columns: int = 0) -> int:
    """Return how many programs a multiprocessor holds; 0 if not one."""
    return min(
        REGISTERS // (-(-max(registers, 1) // 8) * 8 * 32 * warps),
        card.shared_memory // (shared_memory + RESERVED),
        card.warps // warps,
        card.programs,
        COLUMNS // columns if columns else card.programs,
    )


class _Descriptors:
    """Shapes of Blackwell's products: they are in a register, set before."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def shape(self, product: Instruction) -> tuple[int, int]:
        """Return rows and columns."""
        register = re.search(r"idesc\[(UR\d+)\]", product.operands)
        found = None
        for instruction in self.kernel.instructions:
            if instruction.address >= product.address and found is not None:
                break
            # an immediate: UMOV UR5, 0x8200490
            value = re.fullmatch(rf"{register[1] if register else '-'}, (0x[0-9a-f]+)", instruction.operands)
            if value and instruction.base in ("UMOV", "MOV"):
                found = int(value[1], 16)
        if found is None:
            raise ValueError(f"{self.kernel.name}: the shape of the product at {product.address:#x} is unknown")
        return (found >> 24 & 31) * 16, (found >> 17 & 63) * 8


def _tensor(instruction: Instruction, card: Card, warps: int, descriptors: _Descriptors) -> float:
    """Return the clocks of a product in all warps of a program."""
    base, name = instruction.base, instruction.name
    if base == "HGMMA":
        columns, depth = map(int, re.match(r"HGMMA\.64x(\d+)x(\d+)", name).groups())  # type: ignore[union-attr]
        return warps / 4 * 64 * columns * depth / card.matrix
    if base == "HMMA":
        shape = re.search(r"\.16(8)(16|8|4)\b|\.(884)\b", name)
        depth = int(shape[2]) if shape and shape[2] else 4
        return warps * 16 * 8 * depth / card.matrix_of_a_warp
    if base.startswith("UTC"):
        rows, columns = descriptors.shape(instruction)
        # one warp asks for it, 16 terms at a time; 64 rows take as long as 128
        return max(rows, 128) * columns * 16 / card.matrix
    raise ValueError(f"the product {name} has no rate here")


def _shared_bytes(instruction: Instruction, told: str, warps: int) -> float:
    """Return what an instruction of all warps moves through shared memory's path."""
    name = instruction.name
    if instruction.base == "HGMMA":
        columns, depth = map(int, re.match(r"HGMMA\.64x(\d+)x(\d+)", name).groups())  # type: ignore[union-attr]
        from_registers = re.match(r"R\w+,\s*R\w+", instruction.operands)
        return warps / 4 * (columns * depth * 2 + (0 if from_registers else 64 * depth * 2))
    if instruction.base in ("LDSM", "STSM"):
        matrices = re.search(r"M\w*88\.(\d)", name)
        return warps * SHARED * (int(matrices[1]) if matrices else 1)
    if told in ("shared", "local") or instruction.base == "LDGSTS":
        return warps * max(SHARED, 32 * width(name))
    if told == "shuffle":
        return warps * SHARED
    return 0.0


def width(name: str) -> int:
    """Return the bytes a lane that a load or store moves."""
    sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[part] for part in name.split(".")[1:] if part in sizes), 4)
