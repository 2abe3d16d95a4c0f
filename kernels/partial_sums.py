"""Sums over rows in two stages: every program keeps a partial sum of its rows, and a second kernel adds those up.

Atomic additions would do it in one stage, but in the order in which programs happen to finish: another result every
time. Here the order depends on the shape and the card alone.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.aot import AotJob

# tile of partial sums: a warp reads 32 neighbours of a row
PARTIALS, COLUMNS, WARPS = 32, 64, 4


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the streaming multiprocessors of a card; in the interpreter a few, so that there are partial sums."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit(do_not_specialize=["programs"])
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


def sum_partials(partials: Tensor, dtype: torch.dtype, third_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Add up the programs' partial sums.

    Args:
        partials: ``[programs, n, C]`` in float32, contiguous, n of 1 to 3; ``programs`` may be 0.
        dtype: Of the results.
        third_dtype: Of the third one, if it is another.

    Returns:
        n sums ``[C]``.
    """
    programs, outputs, width = partials.shape
    dtypes = (dtype, dtype, third_dtype or dtype)[:outputs]
    sums = [partials.new_empty(width, dtype=dtype) for dtype in dtypes]
    grid = (triton.cdiv(width, COLUMNS), outputs)
    pointers = [sums[min(i, outputs - 1)] for i in range(3)]
    _sum_kernel[grid](partials, *pointers, programs, width, PARTIALS, COLUMNS, outputs, num_warps=WARPS)
    return sums


def aot_jobs() -> list[AotJob]:
    """Return every configuration of :func:`sum_partials`."""
    return [
        AotJob(
            _sum_kernel,
            {"partials": "*fp32", "first": f"*{dtype}", "second": f"*{dtype}", "third": f"*{third}"}
            | {"programs": "i32", "width": "i32"},
            {"PARTIALS": PARTIALS, "COLUMNS": COLUMNS, "OUTPUTS": outputs},
            num_warps=WARPS,
            num_stages=3,
            label=f"partial sums, {outputs} to {dtype}{'' if third == dtype else f', the third to {third}'}",
            divisible_by_16=("width",),
        )
        for dtype, third in (("fp32",) * 2, ("fp16",) * 2, ("bf16",) * 2, ("fp32", "fp16"), ("fp32", "bf16"))
        for outputs in (1, 2, 3)
        if outputs == 3 or dtype == third
    ]
