"""Sums over rows in two stages: every program keeps a partial sum of its rows, and a second kernel adds those up.

Atomic additions would do it in one stage, but in the order in which programs happen to finish: another result every
time. Here the order depends on the shape and the card alone.
"""

from __future__ import annotations

import functools

import torch
import triton.language as tl
from torch import Tensor

from clipfast.kernels.aot import AotJob
from clipfast.kernels.launch import cdiv, jit

# tile of partial sums: a warp reads 32 neighbours of a row
PARTIALS, COLUMNS, WARPS = 32, 64, 4


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the streaming multiprocessors of a card; in the interpreter a few, so that there are partial sums."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@jit(do_not_specialize=["programs"])
def _sum_kernel(
    partials, first, second, programs, width, PARTIALS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr
):
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
    else:
        tl.store(second + column, result.to(second.dtype.element_ty), mask=column < width)


def sum_partials(partials: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Add up the programs' partial sums.

    Args:
        partials: ``[programs, n, C]`` in float32, contiguous, n of 1 or 2; ``programs`` may be 0.
        dtype: Of the result.

    Returns:
        n sums ``[C]``.
    """
    programs, outputs, width = partials.shape
    sums = [torch.empty(width, dtype=dtype, device=partials.device) for _ in range(outputs)]
    grid = (cdiv(width, COLUMNS), outputs)
    _sum_kernel[grid](partials, sums[0], sums[-1], programs, width, PARTIALS, COLUMNS, outputs, num_warps=WARPS)
    return sums


def aot_jobs() -> list[AotJob]:
    """Return every configuration of :func:`sum_partials`."""
    return [
        AotJob(
            _sum_kernel,
            {"partials": "*fp32", "first": f"*{dtype}", "second": f"*{dtype}", "programs": "i32", "width": "i32"},
            {"PARTIALS": PARTIALS, "COLUMNS": COLUMNS, "OUTPUTS": outputs},
            num_warps=WARPS,
            num_stages=3,
            label=f"partial sums, {outputs} to {dtype}",
            divisible_by_16=("width",),
        )
        for dtype in ("fp32", "fp16", "bf16")
        for outputs in (1, 2)
    ]
