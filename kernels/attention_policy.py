"""Which attention kernel, which tiles and how many warps serve a call: by architecture, head_dim, dtype and length.

Nothing here is tuned at run time. The configurations and what they are predicted to cost are in
:mod:`~clipfast.kernels.attention_tables`. What they cost in time is unmeasured.

Any head_dim is served that is a multiple of 8 from 32 to 128: SigLIP's 72, giant-opt's 96, bigG's 104. It is padded to
a power of two, which is what Triton's tiles are: 72 to 120 compute like 128 and read and write what they are. Two tiles
beside each other (64 + 16 for 80) would waste fewer products, but double the tiles that live in registers, which is
what these kernels run out of.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from clipfast.kernels.attention_tables import (
    FP32,
    PACKED,
    STREAMING,
    WHOLE_BACKWARD,
    WHOLE_FORWARD,
    Streaming,
    Whole,
)

# offsets within a tile are 32 bits: 257 rows of at most this many elements
LARGEST_TOKEN_STRIDE = 2**22


def block_d(head_dim: int) -> int:
    """Return the power of two that head_dim is padded to."""
    return 1 << (head_dim - 1).bit_length()


def architecture(capability: tuple[int, int]) -> int:
    """Return the architecture whose tables serve a compute capability: 80, 86, 90 or 100.

    80 has 163 KB of shared memory for a program, 86 stands for all with 99 KB (8.6, 8.9, 12.0) and for those of
    unknown kind: what fits there fits everywhere, and its products are those that every card since 8.0 knows.
    """
    return {(8, 0): 80, (8, 7): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}.get(capability, 86)


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
        architecture: 80, 86, 90 or 100.
        tokens: The length of every sequence; None for packed sequences.
        head_dim: A multiple of 8 from 32 to 128.
        size: Bytes an element.
        causal: Whether a token attends to itself and those before it only.
    """
    if size == 4:
        return FP32[architecture][block_d(head_dim)][0]
    key = (architecture, block_d(head_dim))
    whole = _whole(WHOLE_FORWARD[key], tokens, head_dim, causal)
    if whole is not None:
        return whole
    return PACKED[key][0] if tokens is None else _beside_class_token(STREAMING[key][0], tokens, causal)


def backward_plan(
    architecture: int, tokens: int | None, head_dim: int, size: int, causal: bool
) -> Whole | tuple[Streaming, Streaming]:
    """Return how the backward pass of a call runs: in one kernel, or in two (for queries, for keys)."""
    key = (architecture, block_d(head_dim))
    if size == 4:
        return FP32[architecture][block_d(head_dim)][1:]
    whole = _whole(WHOLE_BACKWARD[key], tokens, head_dim, causal)
    if whole is not None:
        return whole
    if tokens is None:
        return PACKED[key][1:]
    _, for_queries, for_keys = STREAMING[key]
    return _beside_class_token(for_queries, tokens, causal), _beside_class_token(for_keys, tokens, causal)


def _whole(plans: tuple[Whole, ...], tokens: int | None, head_dim: int, causal: bool) -> Whole | None:
    if tokens is None:
        return None
    # beside a class token a padded head spills: with head_dim 40 38 registers forward on 9.0, 124 backward on 8.0
    padded = block_d(head_dim) != head_dim
    return next((p for p in plans if p.holds(tokens, causal) and not (p.class_token and padded)), None)


def _beside_class_token(plan: Streaming, tokens: int | None, causal: bool) -> Streaming:
    """Handle the first token beside the tiles where the others fill tiles of queries and of keys."""
    tile = max(plan.queries, plan.keys)
    exact = tokens is not None and not causal and tokens > tile and tokens % tile == 1
    return replace(plan, class_token=True) if exact else plan
