"""LayerNorm, alone and with the residual addition before it: one pass forward, one pass backward.

A program holds whole rows in registers, so every input is read once and every output written once. Statistics and
sums are in float32 whatever the dtypes of the tensors.
"""

from __future__ import annotations

from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.aot import AotJob
from clipfast.kernels.partial_sums import multiprocessors, sum_partials

MAX_WIDTH = 4096

# Backward programs a multiprocessor: enough to hide memory's latency, few enough that their partial sums are small
# beside the rows (16 · 132 · 768 floats are 6 MB, ViT-B-16's tokens of 256 pictures 77 MB a tensor)
BACKWARD_PROGRAMS = 8


def _tile(width: int) -> tuple[int, int, int]:
    """Return the rows and columns of a program's tile and its warps.

    Several narrow rows share a program; a thread then has at least 8 neighbouring elements, the 16 bytes of one load
    in half precision. The tile depends on the width alone: a row's result cannot depend on its batch.
    """
    block = max(256, triton.next_power_of_2(width))
    rows = max(1, 2048 // block)
    return rows, block, rows * block // 256


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, bias, y, stream, mean, rstd,
    rows, width, x_stride, residual_stride, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # int64 from the first product on: the stream of a large batch has more than 2³¹ elements
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    offsets = row[:, None] * width + column[None, :]

    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        total = value.to(stream.dtype.element_ty)
        tl.store(stream + offsets, total, mask=inside)
        # the stream as it is stored: the backward pass and the next block see nothing else
        value = total.to(tl.float32)

    center = tl.sum(value, 1) / width
    # two passes over registers: E[x²] − E[x]² would lose the spread beside a large mean
    centred = tl.where(inside, value - center[:, None], 0.0)
    scale = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / width + eps)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    result = centred * scale[:, None] * gain[None, :] + shift[None, :]
    tl.store(y + offsets, result.to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, dstream, x, weight, mean, rstd, dx, dx_other, partials,
    rows, width, dy_stride, dstream_stride, x_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, TWO_DTYPES: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    if SUM:
        dsum = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)

        normal = tl.where(inside, (value - center[:, None]) * scale[:, None], 0.0)
        dweight += grad * normal
        dbias += grad
        grad *= gain[None, :]
        along = tl.sum(grad * normal, 1) / width
        level = tl.sum(grad, 1) / width
        result = (grad - normal * along[:, None] - level[:, None]) * scale[:, None]
        if ADD:
            result += tl.load(dstream + row[:, None] * dstream_stride + column[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        if SUM:
            # rows that are none have statistics of zero, and no gradient
            dsum += result
        offsets = row[:, None] * width + column[None, :]
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)
        if TWO_DTYPES:
            tl.store(dx_other + offsets, result.to(dx_other.dtype.element_ty), mask=inside)

    SUMS: tl.constexpr = 3 if SUM else 2
    own = partials + tl.program_id(0).to(tl.int64) * SUMS * width + column
    tl.store(own, tl.sum(dweight, 0), mask=column < width)
    tl.store(own + width, tl.sum(dbias, 0), mask=column < width)
    if SUM:
        tl.store(own + 2 * width, tl.sum(dsum, 0), mask=column < width)


def as_rows(x: Tensor) -> Tensor:
    """Return ``[rows, C]`` with neighbouring columns: a view wherever the rows have one stride, else a copy."""
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``layer_norm(x)`` like ``x``, and the mean and the reciprocal deviation of every row, float32 ``[rows]``.

    Args:
        x: ``[..., C]``, C up to 4096; float32, float16 or bfloat16.
        weight: ``[C]``.
        bias: ``[C]``.
        eps: Added to the variance.
    """
    y, _, mean, rstd = _forward(x, None, weight, bias, eps)
    return y, mean, rstd


def add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``layer_norm(x + residual)``, ``x + residual``, both in the sum's dtype, and the rows' statistics."""
    return _forward(x, residual, weight, bias, eps)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_of_x = as_rows(x)
    rows_of_residual = rows_of_x if residual is None else as_rows(residual)
    rows, width = rows_of_x.shape
    dtype = torch.promote_types(x.dtype, rows_of_residual.dtype)
    y = x.new_empty(x.shape, dtype=dtype)
    stream = y if residual is None else x.new_empty(x.shape, dtype=dtype)
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    tile_rows, block, warps = _tile(width)
    if rows:
        _forward_kernel[(triton.cdiv(rows, tile_rows),)](
            rows_of_x, rows_of_residual, weight.contiguous(), bias.contiguous(), y, stream, mean, rstd,
            rows, width, rows_of_x.stride(0), rows_of_residual.stride(0), eps,
            tile_rows, block, residual is not None, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return y, stream, mean, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` from that of ``layer_norm(x)``."""
    dx, _, dweight, dbias, _ = _backward(dy, None, x, weight, mean, rstd, x.dtype, x.dtype)
    return dx, dweight, dbias


def add_backward(
    dy: Tensor,
    dstream: Tensor,
    stream: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``residual``, ``weight`` and ``bias`` from those of both outputs.

    The first two are one tensor, and the second is empty, where their dtypes are the same. The fifth result is the sum
    over rows of the first in ``sum_dtype``, ``[C]``, empty where that is None.
    """
    return _backward(dy, dstream, stream, weight, mean, rstd, x_dtype, residual_dtype, sum_dtype)


def _backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    other_dtype: torch.dtype,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows_of_dy, rows_of_x = as_rows(dy), as_rows(x)
    rows_of_dstream = rows_of_dy if dstream is None else as_rows(dstream)
    rows, width = rows_of_x.shape
    dx = x.new_empty(x.shape, dtype=dtype)
    dx_other = x.new_empty(0 if dtype == other_dtype else x.shape, dtype=other_dtype)
    tile_rows, block, warps = _tile(width)
    programs = min(triton.cdiv(rows, tile_rows), BACKWARD_PROGRAMS * multiprocessors(x.device))
    partials = x.new_empty((programs, 2 if sum_dtype is None else 3, width), dtype=torch.float32)
    if rows:
        _backward_kernel[(programs,)](
            rows_of_dy, rows_of_dstream, rows_of_x, weight.contiguous(), mean, rstd, dx, dx_other, partials,
            rows, width, rows_of_dy.stride(0), rows_of_dstream.stride(0), rows_of_x.stride(0),
            tile_rows, block, dstream is not None, dtype != other_dtype, sum_dtype is not None,
            num_warps=warps, num_stages=1,
        )  # fmt: skip
    dweight, dbias, *sums = sum_partials(partials, weight.dtype, sum_dtype)
    return dx, dx_other, dweight, dbias, sums[0] if sums else x.new_empty(0)


def aot_jobs() -> list[AotJob]:
    """Return every tile in the dtypes of pure half and full precision and of autocast (a float32 stream)."""
    return [
        job
        for width, add in product((256, 512, 1024, 2048, 4096), (False, True))
        for x, stream, weight in (("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp16"), ("bf16", "bf16", "bf16"),
                                  ("bf16", "bf16", "fp32"), ("fp16", "fp32", "fp32"), ("bf16", "fp32", "fp32"))
        if add or x == stream
        for job in _jobs(width, add, x, stream, weight)
    ]  # fmt: skip


def _jobs(width: int, add: bool, x: str, stream: str, weight: str) -> list[AotJob]:
    rows, block, warps = _tile(width)
    pointers = {"x": x, "residual": stream, "weight": weight, "bias": weight, "y": stream, "stream": stream}
    pointers |= {"mean": "fp32", "rstd": "fp32"}
    forward_signature = {name: f"*{dtype}" for name, dtype in pointers.items()}
    forward_signature |= dict.fromkeys(("rows", "width", "x_stride", "residual_stride"), "i32") | {"eps": "fp32"}
    pointers = {"dy": stream, "dstream": stream, "x": stream, "weight": weight, "mean": "fp32", "rstd": "fp32"}
    pointers |= {"dx": x, "dx_other": stream, "partials": "fp32"}
    backward_signature = {name: f"*{dtype}" for name, dtype in pointers.items()}
    backward_signature |= dict.fromkeys(("rows", "width", "dy_stride", "dstream_stride", "x_stride"), "i32")
    tile: dict[str, object] = {"ROWS": rows, "BLOCK": block, "ADD": add}
    name = f"{'add ' if add else ''}layer norm, width ≤ {block}, {x} to {stream}, weights {weight}"
    return [
        AotJob(
            _forward_kernel, forward_signature, tile, warps, 1, f"{name}, forward",
            divisible_by_16=("width", "x_stride", "residual_stride"),
        ),
    ] + [
        AotJob(
            _backward_kernel, backward_signature, tile | {"TWO_DTYPES": x != stream, "SUM": sums}, warps, 1,
            f"{name}, backward{' with the sum of gradients' if sums else ''}",
            divisible_by_16=("width", "dy_stride", "dstream_stride", "x_stride"),
        )
        for sums in ((False, True) if add else (False,))
    ]  # fmt: skip
