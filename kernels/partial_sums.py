"""Sums over rows in two stages: every program keeps a partial sum of its rows, and a second kernel adds those up.

Atomic additions would do it in one stage, but in the order in which programs happen to finish: another result every
time. Here the order depends on the shape and the card alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from clipfast.kernels.aot import Call, Loop, Work, tensor
from clipfast.kernels.launch import cdiv, jit

# Tile of partial sums: few columns and many programs' rows, so that there are a hundred programs for 768 columns and
# each of them waits for memory twice. 16 neighbours are 64 bytes, two sectors of memory.
PARTIALS, COLUMNS, WARPS = 256, 16, 8


@jit(do_not_specialize=["programs"])
def _sum_kernel(
    partials, first, second, third, programs, width,
    PARTIALS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    output = tl.program_id(1)
    total = tl.zeros((PARTIALS, COLUMNS), tl.float32)
    for start in range(0, programs, PARTIALS):
        program = (start + tl.arange(0, PARTIALS)).to(tl.int64)
        inside = (program < programs)[:, None] & (column < width)[None, :]
        offsets = (program * OUTPUTS + output)[:, None] * width + column[None, :]
        total += tl.load(partials + offsets, mask=inside, other=0.0)
    result = tl.sum(total, 0)
    if output == 0:
        tl.store(first + column, result.to(first.dtype.element_ty), mask=column < width)
    elif output == 1:
        tl.store(second + column, result.to(second.dtype.element_ty), mask=column < width)
    else:
        tl.store(third + column, result.to(third.dtype.element_ty), mask=column < width)


def sum_partials(partials: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Add up the programs' partial sums.

    Args:
        partials: ``[programs, n, C]`` in float32, contiguous, n of 1 to 3; ``programs`` may be 0.
        dtypes: Of the n results.

    Returns:
        n sums ``[C]``.
    """
    programs, outputs, width = partials.shape
    sums = [torch.empty(width, dtype=dtype, device=partials.device) for dtype in dtypes]
    three = [*sums, sums[-1], sums[-1]][:3]
    grid = (cdiv(width, COLUMNS), outputs)
    _sum_kernel[grid](partials, *three, programs, width, PARTIALS, COLUMNS, outputs, num_warps=WARPS)
    return sums


def aot_work(name: str, values: Mapping[str, Any]) -> Work:
    """Return the trips of the kernel's loop: over tiles of programs."""
    return Work((Loop(-(-values["programs"] // values["PARTIALS"])),))


def aot_calls() -> Iterator[Call]:
    """Yield every configuration of :func:`sum_partials`."""
    for dtype, outputs in itertools.product(("fp32", "fp16", "bf16"), (1, 2, 3)):
        partials = tensor(1056, outputs, 768, dtype="fp32")
        target = tensor(0, dtype=dtype).dtype
        run = functools.partial(sum_partials, partials, [target] * outputs)
        yield Call(f"partial sums, {outputs} to {dtype}", run, quick=dtype == "bf16")
