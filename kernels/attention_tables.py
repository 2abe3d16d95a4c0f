"""The attention kernels' configurations, by architecture, head_dim and length, and what they are predicted to cost.

They are the best of those tried by the time that they are predicted to take, none of it measured: docs/kernels.md says
how that is reckoned and what was tried, ``scripts/compile_kernels.py`` reckons it again. Beside a configuration are, in
bfloat16, the clocks that a head takes of device memory and of the multiprocessor's resource that takes longest
otherwise, and how many programs a multiprocessor holds. 86 stands for an RTX 5090 there. Where there are no figures
(head_dim 32), the configuration is the first that compiled without a spill.

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
        causal: Whether it serves calls with the causal mask too.
    """

    keys: tuple[int, int]
    queries: int
    warps: int
    stages: int
    class_token: bool = False
    causal: bool = True

    def holds(self, tokens: int, causal: bool) -> bool:
        """Return whether a sequence fits."""
        if self.class_token:
            return tokens == sum(self.keys) + 1 and not causal
        return tokens <= sum(self.keys) and (self.causal or not causal)


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
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 2,182, shared 940; 3 programs
        Whole((64, 16), 64, 4, 1),  # 77 tokens: memory 3,362, shared 2,104; 3 programs
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 5,587, shared 2,904; 2 programs
        Whole((256, 0), 64, 4, 2, class_token=True),  # 257 tokens: memory 11,219, shared 10,800; 2 programs
    ),
    (80, 128): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 4,349, shared 2,148; 2 programs
        Whole((64, 16), 64, 8, 2),
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 11,132, shared 5,448; 2 programs
    ),
    (86, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2),
    ),
    (86, 64): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 6,579, tensor 2,048; 3 programs
        Whole((64, 16), 64, 4, 1),  # 77 tokens: memory 10,131, tensor 5,120; 3 programs
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 16,843, tensor 8,192; 2 programs
    ),
    (86, 128): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 13,107, tensor 4,096; 2 programs
        Whole((64, 16), 32, 4, 1),  # 77 tokens: memory 20,184, tensor 8,448; 2 programs
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 33,554, tensor 16,384; 1 program
    ),
    (90, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 1),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (90, 64): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 1,930, issue 854; 4 programs
        Whole((64, 16), 64, 4, 1),  # 77 tokens: memory 2,972, issue 1,764; 4 programs
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 4,940, issue 2,166; 3 programs
        Whole((256, 0), 64, 4, 1),  # 197 tokens: memory 7,604, issue 5,263; 2 programs
        Whole((256, 0), 64, 4, 2, class_token=True),  # 257 tokens: memory 9,919, issue 6,414; 2 programs
    ),
    (90, 128): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 3,845, issue 1,181; 2 programs
        Whole((64, 16), 64, 4, 1),  # 77 tokens: memory 5,921, issue 2,476; 2 programs
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 9,842, issue 2,800; 2 programs
    ),
    (100, 32): (
        Whole((64, 0), 64, 4, 1),
        Whole((64, 16), 64, 4, 1),
        Whole((128, 0), 64, 4, 1),
        Whole((256, 0), 64, 8, 2),
        Whole((256, 0), 64, 4, 2, class_token=True),
    ),
    (100, 64): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 982, issue 1,018; 3 programs
        Whole((64, 16), 64, 4, 1),  # 77 tokens: memory 1,512, issue 1,945; 3 programs
        Whole((128, 0), 64, 4, 1),  # 128 tokens: memory 2,513, issue 2,230; 2 programs
        # with the mask 312 spills
        Whole((256, 0), 64, 4, 1, causal=False),  # 197 tokens: memory 3,869, issue 6,090; 2 programs
    ),
    (100, 128): (
        Whole((64, 0), 64, 4, 1),  # 50 tokens: memory 1,956, issue 1,366; 2 programs
        Whole((64, 16), 64, 4, 1),  # 77 tokens: memory 3,012, issue 2,553; 2 programs
        Whole((128, 0), 64, 4, 2),  # 128 tokens: memory 5,008, issue 5,874; 2 programs
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
        Whole((64, 0), 32, 4, 1),  # 50 tokens: memory 4,349, shared 2,688; 2 programs
        Whole((128, 0), 64, 8, 1),  # 128 tokens: memory 11,132, shared 9,600; 1 program
        Whole((256, 0), 16, 8, 1, class_token=True),  # 257 tokens: memory 22,351, shared 44,024; 1 program
    ),
    (80, 128): (Whole((64, 0), 16, 8, 1),),
    (86, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
    ),
    (86, 64): (
        Whole((64, 0), 32, 4, 1),  # 50 tokens: memory 13,107, tensor 5,120; 2 programs
        Whole((128, 0), 32, 8, 1),  # 128 tokens: memory 33,554, tensor 24,576; 1 program
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
        Whole((64, 0), 32, 4, 1),  # 50 tokens: memory 3,845, shared 1,536; 3 programs
        Whole((64, 16), 32, 4, 1),  # 77 tokens: memory 5,921, shared 3,760; 2 programs
        Whole((128, 0), 16, 4, 1),  # 128 tokens: memory 9,842, shared 6,144; 2 programs
        Whole((256, 0), 32, 8, 1),  # 197 tokens: memory 15,148, shared 15,648; 1 program
        Whole((256, 0), 32, 8, 1, class_token=True),  # 257 tokens: memory 19,762, shared 21,944; 1 program
    ),
    (90, 128): (
        Whole((64, 0), 16, 4, 1),  # 50 tokens: memory 7,674, shared 3,744; 2 programs
        Whole((128, 0), 32, 8, 1),  # 128 tokens: memory 19,647, shared 9,024; 1 program
    ),
    (100, 32): (
        Whole((64, 0), 32, 4, 1),
        Whole((64, 16), 32, 4, 1),
        Whole((128, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1),
        Whole((256, 0), 32, 8, 1, class_token=True),
    ),
    (100, 64): (
        Whole((64, 0), 32, 4, 1),  # 50 tokens: memory 1,956, issue 1,598; 3 programs
        Whole((64, 16), 32, 4, 1),  # 77 tokens: memory 3,012, shared 2,876; 2 programs
        Whole((128, 0), 32, 8, 1),  # 128 tokens: memory 5,008, issue 5,052; 2 programs
        Whole((256, 0), 32, 8, 1),  # 197 tokens: memory 7,707, issue 12,424; 1 program
    ),
    (100, 128): (
        Whole((64, 0), 32, 4, 1),  # 50 tokens: memory 3,905, issue 2,484; 2 programs
        Whole((64, 16), 16, 4, 1),  # 77 tokens: memory 6,013, shared 5,460; 2 programs
        Whole((128, 0), 32, 8, 1),  # 128 tokens: memory 9,996, issue 7,574; 1 program
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
        Streaming(64, 128, 4, 2),  # 576 tokens: memory 25,145, tensor 46,080; 2 programs
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 37,814, shared 91,260; 2 programs
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 37,814, shared 117,504; 2 programs
    ),
    (80, 128): (
        Streaming(32, 64, 4, 2),  # 576 tokens: memory 50,094, shared 221,472; 2 programs
        Streaming(64, 64, 8, 2),
        Streaming(64, 32, 8, 2),
    ),
    (86, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 32, 4, 1),
    ),
    (86, 64): (
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 75,790, tensor 165,888; 2 programs
        Streaming(32, 64, 4, 2),  # 576 tokens: memory 113,979, tensor 248,832; 2 programs
        Streaming(64, 32, 4, 1),  # 576 tokens: memory 113,979, tensor 331,776; 2 programs
    ),
    (86, 128): (
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 150,992, tensor 331,776; 2 programs
        Streaming(32, 64, 4, 1),  # 576 tokens: memory 226,783, tensor 497,664; 2 programs
        Streaming(32, 32, 4, 1),  # 576 tokens: memory 226,783, tensor 663,552; 2 programs
    ),
    (90, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (90, 64): (
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 22,232, issue 35,334; 3 programs
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 33,434, shared 39,420; 3 programs
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 33,434, shared 44,928; 2 programs
    ),
    (90, 128): (
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 44,291, shared 57,996; 2 programs
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 66,523, shared 79,020; 2 programs
        Streaming(64, 32, 4, 1),  # 576 tokens: memory 66,523, shared 110,592; 2 programs
    ),
    (100, 32): (
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
        Streaming(64, 64, 4, 1),
    ),
    (100, 64): (
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 11,311, issue 33,156; 4 programs
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 17,010, issue 34,506; 4 programs
        Streaming(64, 64, 4, 1),
    ),
    (100, 128): (
        Streaming(64, 64, 4, 1),  # 576 tokens: memory 22,535, issue 41,346; 2 programs
        # with 4 warps 71 spills beside a class token
        Streaming(64, 64, 8, 1),
        Streaming(64, 64, 4, 1),
    ),
}

# packed sequences, of which most are captions of 10 to 30 tokens: short tiles
# twice: each card's row is chosen alone, and a measurement may change one of them
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
