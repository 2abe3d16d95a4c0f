"""The attention kernels' configurations, by architecture, head_dim and length, and what they are predicted to cost.

Every entry is the best of those tried by the time that it is predicted to take (docs/kernels.md says which were tried):
of the clocks of a multiprocessor's resources the largest, or that of the programs that it holds one behind the other.
Beside it: the clocks of a program that device memory takes and those of the resource that takes longest otherwise, in
bfloat16, and programs a multiprocessor. ``scripts/compile_kernels.py`` reckons them again.

Architectures are those of :func:`clipfast.kernels.attention_policy.architecture`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Whole:
    """One program holds all keys of a head.

    Attributes:
        keys: The sizes of the one or two tiles that they are (0: no second one).
        queries: Queries a tile.
        class_token: Whether the first token is handled beside the tiles, which it makes exact.
        warps, stages: Triton's num_warps and num_stages.
    """

    keys: tuple[int, int]
    queries: int
    warps: int
    stages: int
    class_token: bool = False

    def holds(self, tokens: int, causal: bool) -> bool:
        """Return whether a sequence fits."""
        if self.class_token:
            return tokens == sum(self.keys) + 1 and not causal
        return tokens <= sum(self.keys)


@dataclass(frozen=True)
class Streaming:
    """Tiles of keys pass by tiles of queries (or the other way round). Attributes as of :class:`Whole`."""

    keys: int
    queries: int
    warps: int
    stages: int
    class_token: bool = False


# by (architecture, padded head_dim): the shortest that holds a sequence serves it
WHOLE_FORWARD = {
    (80, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (80, 64): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (80, 128): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 8, 2),
        Whole((128, 0), 64, 4, 1),
    ),
    (86, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2),
    ),
    (86, 64): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
    ),
    (86, 128): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 64, 4, 1),
    ),
    (90, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (90, 64): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (90, 128): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
    ),
    (100, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 8, 2),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (100, 64): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
    ),
    (100, 128): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 2),
    ),
}

# dK and dV of all keys are kept in registers: few queries a tile, and at head_dim 128 no more than 128 keys
WHOLE_BACKWARD = {
    (80, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1, class_token=True),
    ),
    (80, 64): (
        Whole((64, 0), 32, 4, 1),
        Whole((128, 0), 64, 8, 1),
        Whole((256, 0), 16, 8, 1, class_token=True),
    ),
    (80, 128): (Whole((64, 0), 16, 8, 1),),
    (86, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
    ),
    (86, 64): (
        Whole((64, 0), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
    ),
    (86, 128): (Whole((64, 0), 16, 8, 1),),
    (90, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1, class_token=True),
    ),
    (90, 64): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 16, 4, 1),
        Whole((256, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1, class_token=True),
    ),
    (90, 128): (
        Whole((64, 0), 16, 4, 1),
        Whole((128, 0), 32, 8, 1),
    ),
    (100, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1, class_token=True),
    ),
    (100, 64): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
    ),
    (100, 128): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 16, 4, 1),
        Whole((128, 0), 32, 8, 1),
    ),
}

# sequences of one length: forward, backward for queries, for keys
STREAMING = {
    (80, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 2),
        Streaming(64, 64, 4, 2),
    ),
    (80, 64): (
        Streaming(64, 128, 4, 2),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (80, 128): (
        Streaming(32, 64, 4, 2),
        Streaming(64, 64, 8, 2),
        Streaming(64, 32, 8, 2),
    ),
    (86, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (86, 64): (
        Streaming(64, 64, 4, 1),
        Streaming(32, 64, 4, 2),
        Streaming(64, 32, 4, 1),
    ),
    (86, 128): (
        Streaming(64, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(32, 32, 4, 1),
    ),
    (90, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (90, 64): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (90, 128): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (100, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (100, 64): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (100, 128): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
}

# packed sequences, of which most are captions of 10 to 30 tokens: short tiles
PACKED = {
    (80, 32): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (80, 64): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (80, 128): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(32, 32, 4, 1),
    ),
    (86, 32): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (86, 64): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (86, 128): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(32, 32, 4, 1),
    ),
    (90, 32): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (90, 64): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (90, 128): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 16, 4, 1),
    ),
    (100, 32): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (100, 64): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (100, 128): (
        Streaming(32, 64, 4, 1),
        Streaming(32, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
}

# fp32 products run on the CUDA cores, from registers: small tiles, and no room for a class token beside them.
# By architecture and padded head_dim: forward, for queries, for keys
_FP32 = {
    32: (Streaming(32, 32, 4, 1), Streaming(32, 32, 4, 1), Streaming(32, 32, 8, 1)),
    64: (Streaming(32, 32, 4, 1), Streaming(32, 32, 8, 1), Streaming(32, 32, 8, 1)),
    128: (Streaming(32, 32, 4, 1), Streaming(16, 16, 8, 1), Streaming(32, 32, 8, 1)),
}
FP32 = {
    80: _FP32,
    # 59 to 324 spills on 8.9 with the others' tiles
    86: _FP32 | {128: (Streaming(32, 32, 8, 1), Streaming(16, 16, 8, 1), Streaming(16, 16, 8, 1))},
    90: _FP32,
    100: _FP32,
}
