"""Which attention kernel, which tiles and how many warps serve a call: by architecture, head_dim, dtype and length.

Nothing here is tuned at run time. The tables hold, for every class of calls, the first of the configurations tried that
compiles without a spill (docs/kernels.md has their registers and shared memory). What they cost in time is unmeasured.

head_dim is padded to a power of two, which is what Triton's tiles are: 80, 96 and 104 compute like 128 and read and
write what they are. Two tiles beside each other (64 + 16 for 80) would waste fewer products, but double the tiles that
live in registers, which is what these kernels run out of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

HEAD_DIMS = (32, 64, 80, 96, 104, 128)
# offsets within a tile are 32 bits: 257 rows of at most this many elements
LARGEST_TOKEN_STRIDE = 2**22


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


def block_d(head_dim: int) -> int:
    """Return the power of two that head_dim is padded to."""
    return 1 << (head_dim - 1).bit_length()


def architecture(capability: tuple[int, int]) -> int:
    """Return the architecture whose tables serve a compute capability: cards of unknown kind get sm_80's."""
    return {9: 90, 10: 100}.get(capability[0], 80)


def in_place(strides: Sequence[int]) -> bool:
    """Return whether the kernels read queries, keys and values of these strides where they lie, and not a copy."""
    return strides[-1] == 1 and strides[-4] <= LARGEST_TOKEN_STRIDE


def unit(strides: Sequence[int]) -> int:
    """Return in which unit the kernels are told the strides: 8 elements if all are multiples of 8, else 1.

    A unit of 8 lets every row start on 16 bytes. Every copy has it, since every head_dim is a multiple of 8.
    """
    return 8 if not in_place(strides) or math.gcd(8, *strides[:-1]) == 8 else 1


def sign(scale: float) -> int:
    """Return -1, 0 or 1 (for NaN too): the forward kernels are compiled for each."""
    return -1 if scale < 0 else 0 if scale == 0 else 1


def forward_plan(architecture: int, tokens: int | None, head_dim: int, size: int, causal: bool) -> Whole | Streaming:
    """Return how the forward pass of a call runs.

    Args:
        architecture: 80, 90 or 100.
        tokens: The length of every sequence; None for packed sequences.
        head_dim: One of ``HEAD_DIMS``.
        size: Bytes an element.
        causal: Whether a token attends to itself and those before it only.
    """
    if size == 4:
        return _FP32[block_d(head_dim)][0]
    key = (architecture, block_d(head_dim))
    whole = _whole(_WHOLE_FORWARD[key], tokens, causal)
    if whole is not None:
        return whole
    dense, packed = _STREAMING_FORWARD[key]
    if tokens is None:
        return packed
    # 577 = 1 + 9 · 64: nine tiles of 64 queries, and not of 128
    beside = _beside_class_token(packed, tokens, causal)
    return beside if beside.class_token else dense


def backward_plan(
    architecture: int, tokens: int | None, head_dim: int, size: int, causal: bool
) -> Whole | tuple[Streaming, Streaming]:
    """Return how the backward pass of a call runs: in one kernel, or in two (for queries, for keys)."""
    key = (architecture, block_d(head_dim))
    if size == 4:
        return _FP32[block_d(head_dim)][1:]
    whole = _whole(_WHOLE_BACKWARD[key], tokens, causal)
    if whole is not None:
        return whole
    for_queries, for_keys = _STREAMING_BACKWARD[key]
    return _beside_class_token(for_queries, tokens, causal), _beside_class_token(for_keys, tokens, causal)


def _whole(plans: tuple[Whole, ...], tokens: int | None, causal: bool) -> Whole | None:
    return next((p for p in plans if tokens is not None and p.holds(tokens, causal)), None)


def _beside_class_token(plan: Streaming, tokens: int | None, causal: bool) -> Streaming:
    """Handle the first token beside the tiles where the others fill tiles of queries and of keys."""
    tile = max(plan.queries, plan.keys)
    exact = tokens is not None and not causal and tokens > tile and tokens % tile == 1
    return replace(plan, class_token=True) if exact else plan


# by (architecture, padded head_dim): the shortest that holds a sequence serves it
_WHOLE_FORWARD = {
    (80, 32): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 4, 2),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (80, 64): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 4, 1),
    ),
    (80, 128): (Whole((64, 0), 64, 4, 2), Whole((64, 16), 64, 8, 2), Whole((128, 0), 64, 4, 2)),
    (90, 32): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (90, 64): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 4, 1),
        Whole((256, 0), 64, 8, 2, class_token=True),
    ),
    (90, 128): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 8, 2),
        Whole((256, 0), 64, 8, 1),
    ),
    (100, 32): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 8, 2),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (100, 64): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 8, 2),
        Whole((256, 0), 64, 8, 2, class_token=True),
    ),
    (100, 128): (
        Whole((64, 0), 64, 4, 2),
        Whole((64, 16), 64, 4, 2),
        Whole((128, 0), 64, 4, 2),
        Whole((256, 0), 64, 8, 2),
    ),
}

# dK and dV of all keys are kept in registers: few queries a tile, and at head_dim 128 no more than 128 keys
_WHOLE_BACKWARD = {
    (80, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1, class_token=True),
    ),
    (80, 64): (Whole((64, 0), 32, 4, 1), Whole((128, 0), 32, 8, 1)),
    (80, 128): (Whole((64, 0), 16, 8, 1),),
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
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 16, 8, 1),
        Whole((256, 0), 16, 8, 1, class_token=True),
    ),
    (90, 128): (Whole((64, 0), 16, 4, 1), Whole((128, 0), 32, 8, 1)),
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
        Whole((128, 0), 16, 8, 1),
        Whole((256, 0), 16, 8, 1),
    ),
    (100, 128): (Whole((64, 0), 16, 4, 1), Whole((128, 0), 32, 8, 1)),
}

# sequences of one length, packed sequences
_STREAMING_FORWARD = {
    (80, 32): (Streaming(64, 128, 8, 1), Streaming(64, 64, 4, 1)),
    (80, 64): (Streaming(64, 128, 8, 2), Streaming(64, 64, 4, 2)),
    (80, 128): (Streaming(32, 64, 4, 2), Streaming(32, 64, 4, 2)),
    (90, 32): (Streaming(64, 128, 8, 2), Streaming(64, 64, 4, 2)),
    (90, 64): (Streaming(64, 128, 8, 2), Streaming(64, 64, 4, 2)),
    (90, 128): (Streaming(64, 128, 8, 2), Streaming(64, 64, 4, 1)),
    (100, 32): (Streaming(64, 128, 8, 2), Streaming(64, 64, 4, 2)),
    (100, 64): (Streaming(64, 128, 8, 2), Streaming(64, 64, 4, 2)),
    (100, 128): (Streaming(64, 64, 8, 2), Streaming(64, 64, 8, 2)),
}

# for queries, for keys
_STREAMING_BACKWARD = {
    (80, 32): (Streaming(64, 64, 4, 2), Streaming(64, 64, 4, 2)),
    (80, 64): (Streaming(64, 32, 4, 2), Streaming(64, 32, 4, 2)),
    (80, 128): (Streaming(64, 64, 8, 2), Streaming(64, 32, 8, 2)),
    (90, 32): (Streaming(64, 64, 4, 2), Streaming(64, 64, 4, 2)),
    (90, 64): (Streaming(64, 64, 4, 1), Streaming(64, 32, 4, 2)),
    (90, 128): (Streaming(64, 64, 8, 1), Streaming(64, 32, 8, 2)),
    (100, 32): (Streaming(64, 64, 4, 2), Streaming(64, 64, 4, 2)),
    (100, 64): (Streaming(64, 64, 4, 2), Streaming(64, 32, 4, 2)),
    (100, 128): (Streaming(64, 32, 8, 1), Streaming(64, 32, 8, 1)),
}

# fp32 products run on the CUDA cores, from registers: small tiles, and no room for a class token beside them.
# By padded head_dim: forward, for queries, for keys
_FP32 = {
    32: (Streaming(32, 32, 4, 1), Streaming(32, 32, 4, 1), Streaming(32, 32, 8, 1)),
    64: (Streaming(32, 32, 4, 1), Streaming(32, 32, 8, 1), Streaming(32, 32, 8, 1)),
    128: (Streaming(32, 32, 4, 1), Streaming(16, 16, 8, 1), Streaming(32, 32, 8, 1)),
}
