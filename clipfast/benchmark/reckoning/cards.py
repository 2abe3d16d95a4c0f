"""What each card is assumed to do a clock: public figures of its architecture, none of them measured here.

Lanes a clock and multiprocessor are from the table of arithmetic throughput in NVIDIA's CUDA C++ Programming Guide,
limits of a multiprocessor from its table of compute capabilities. Tensor cores follow from the peak in bfloat16 with
sums in float32, without sparsity, that NVIDIA states for the card, over its multiprocessors and clock. The clock and
the bandwidth are what a long run is assumed to keep: of the bandwidth about 0.9.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: Its name.
        clock: Of the multiprocessors, Hz.
        multiprocessors: How many.
        memory: Bytes a second to and from device memory.
        fp32: Lanes a clock and multiprocessor of float32 additions and multiplications.
        alu: Lanes of integer, logical and comparing instructions.
        matrix: Multiplications with addition a clock and multiprocessor in 16 bits: of the instructions that the
            architecture prefers (``mma.sync``, ``wgmma``, ``tcgen05``).
        matrix_of_a_warp: Of ``mma.sync``.
        shared_memory: Bytes of a multiprocessor that programs may use.
        warps, programs: What a multiprocessor holds of them.
    """

    name: str
    clock: float
    multiprocessors: int
    memory: float
    fp32: int
    alu: int
    matrix: int
    matrix_of_a_warp: int
    shared_memory: int
    warps: int
    programs: int

    @property
    def memory_a_clock(self) -> float:
        """Bytes of device memory a clock and multiprocessor."""
        return self.memory / self.multiprocessors / self.clock


# of every card: lanes a clock of the special functions, bytes a clock of shared memory, registers, columns of tensor
# memory (10.0), and bytes of shared memory that the system takes from a program
SPECIAL, SHARED, REGISTERS, COLUMNS, RESERVED = 16, 128, 65536, 512, 1024
# clocks until a load from device memory is there, and microseconds between two dependent kernels of a stream: estimates
LATENCY, LAUNCH = 800, 1.5

_KB = 1024
# mma.sync reaches about half of wgmma's rate on 9.0, and is assumed to on 10.0
CARDS = {
    80: Card("A100 80 GB", 1.41e9, 108, 1.8e12, 64, 64, 1024, 1024, 164 * _KB, 64, 32),
    86: Card("A10", 1.5e9, 72, 0.54e12, 128, 64, 512, 512, 100 * _KB, 48, 16),
    89: Card("L40S", 2.3e9, 142, 0.78e12, 128, 64, 512, 512, 100 * _KB, 48, 24),
    90: Card("H100 SXM", 1.7e9, 132, 3.0e12, 128, 64, 2048, 1024, 228 * _KB, 64, 32),
    100: Card("B200", 1.8e9, 148, 7.0e12, 128, 64, 4096, 1024, 228 * _KB, 64, 32),
    120: Card("RTX 5090", 2.4e9, 170, 1.6e12, 128, 128, 256, 256, 100 * _KB, 48, 24),
}
