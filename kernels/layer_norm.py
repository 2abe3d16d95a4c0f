"""LayerNorm, alone and with the residual addition before it: one pass forward, one pass backward.

A program holds whole rows in registers, so every input is read once and every output written once. Statistics and
sums are in float32 whatever the dtypes of the tensors.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from clipfast.kernels.aot import Call, Loop, Work, tensor
from clipfast.kernels.card import multiprocessors
from clipfast.kernels.launch import cdiv, jit
from clipfast.kernels.partial_sums import sum_partials

MAX_WIDTH = 4096

# A warp's lanes hold 32 elements each of its row or rows, 8 neighbours at a time: the 16 bytes of one load in half
# precision. Four warps share a program, and the loads of gain and shift and the backward pass' partial sums.
WARPS, ELEMENTS = 4, 32

# Backward programs a multiprocessor: as many as its registers hold, so that none has to wait for another to end, and
# their partial sums are few (2 · 132 · 2 · 768 floats are 1.6 MB, ViT-B-32's tokens of 256 pictures 20 MB a tensor)
BACKWARD_PROGRAMS = 2


@functools.cache
def _tile(width: int, neighbours: int) -> tuple[int, int, int]:
    """Return the tile of a program: chunks × rows × columns of a chunk.

    Up to 1024 columns a row is one warp's: its sums need no other warp. Beyond, two or four share it. A chunk is what
    the warps of a row read at once; with the rows between chunks and columns, Triton gives the other warps rows. The
    tile depends on the width and the dtypes alone: a row's result cannot depend on its batch.

    Args:
        width: The columns.
        neighbours: Elements of a lane's load.
    """
    block = max(256, triton.next_power_of_2(width))
    chunk = max(1, block // (32 * ELEMENTS)) * 32 * neighbours
    return block // chunk, WARPS * 32 * ELEMENTS // block, chunk


@triton.jit
def _columns(CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """Return the columns of a tile, ``[CHUNKS, 1, CHUNK]``."""
    return tl.arange(0, CHUNKS)[:, None, None] * CHUNK + tl.arange(0, CHUNK)[None, None, :]


@triton.jit
def _row_sums(value):
    """Return the sums of rows: over chunks within a lane first."""
    return tl.sum(tl.sum(value, 0), 1)[None, :, None]


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, bias, y, stream, mean, rstd,
    rows, width, x_stride, residual_stride, eps,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    # int64 from the first product on: the stream of a large batch has more than 2³¹ elements
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = first + tl.arange(0, ROWS)[None, :, None]
    column = _columns(CHUNKS, CHUNK)
    inside = (row < rows) & (column < width)
    offsets = row * width + column

    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = value.to(stream.dtype.element_ty)
        tl.store(stream + offsets, total, mask=inside)
        # the stream as it is stored: the backward pass and the next block see nothing else
        value = total.to(tl.float32)

    center = _row_sums(value) / width
    # two passes over registers: E[x²] − E[x]² would lose the spread beside a large mean
    centred = tl.where(inside, value - center, 0.0)
    scale = 1 / tl.sqrt_rn(_row_sums(centred * centred) / width + eps)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    tl.store(y + offsets, (centred * scale * gain + shift).to(y.dtype.element_ty), mask=inside)
    tl.store(mean + row, center, mask=row < rows)
    tl.store(rstd + row, scale, mask=row < rows)


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, dstream, x, weight, mean, rstd, dx, dx_other, partials,
    rows, width, dy_stride, dstream_stride, x_stride,
    CHUNKS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, ADD: tl.constexpr, TWO_DTYPES: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    column = _columns(CHUNKS, CHUNK)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((CHUNKS, ROWS, CHUNK), tl.float32)
    dbias = tl.zeros((CHUNKS, ROWS, CHUNK), tl.float32)
    if SUMS:
        sums = tl.zeros((CHUNKS, ROWS, CHUNK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
        inside = (row < rows) & (column < width)
        value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row * dy_stride + column, mask=inside, other=0.0).to(tl.float32)
        center = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)

        normal = tl.where(inside, (value - center) * scale, 0.0)
        dweight += grad * normal
        dbias += grad
        grad *= gain
        along = _row_sums(grad * normal) / width
        level = _row_sums(grad) / width
        result = (grad - normal * along - level) * scale
        if ADD:
            result += tl.load(dstream + row * dstream_stride + column, mask=inside, other=0.0).to(tl.float32)
        if SUMS:
            # rows that are none have statistics of zero, and no gradient
            sums += result
        offsets = row * width + column
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)
        if TWO_DTYPES:
            tl.store(dx_other + offsets, result.to(dx_other.dtype.element_ty), mask=inside)

    own = partials + tl.program_id(0).to(tl.int64) * (3 if SUMS else 2) * width + column
    tl.store(own, tl.sum(dweight, 1)[:, None, :], mask=column < width)
    tl.store(own + width, tl.sum(dbias, 1)[:, None, :], mask=column < width)
    if SUMS:
        tl.store(own + 2 * width, tl.sum(sums, 1)[:, None, :], mask=column < width)


def empty(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous tensor of the shape of ``x``; ``x.new_empty(x.shape)`` takes the host twice as long."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def as_rows(x: Tensor) -> Tensor:
    """Return ``[rows, C]`` with neighbouring columns: a view wherever the rows have one stride, else a copy."""
    if x.dim() == 2 and x.stride(1) == 1:
        return x
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
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    y = empty(x, dtype)
    stream = y if residual is None else empty(x, dtype)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    chunks, tile_rows, chunk = _tile(width, _neighbours(x, rows_of_residual))
    if rows:
        _forward_kernel[(cdiv(rows, tile_rows),)](
            rows_of_x, rows_of_residual, weight.contiguous(), bias.contiguous(), y, stream, mean, rstd,
            rows, width, rows_of_x.stride(0), rows_of_residual.stride(0), eps,
            chunks, tile_rows, chunk, residual is not None, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return y, stream, mean, rstd


def _neighbours(*tensors: Tensor) -> int:
    """Return the neighbouring elements of a lane's load: 16 bytes of the narrowest dtype."""
    return 16 // min([t.element_size() for t in tensors])


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
    over rows of the first, before it is rounded, in ``sum_dtype``, ``[C]``: the gradient of a bias that was added to
    every row of ``x``. It is empty where that is None.
    """
    return _backward(dy, dstream, stream, weight, mean, rstd, x_dtype, residual_dtype, sum_dtype)


# twice: of both norms, and so each public function's arguments
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
    dx = empty(x, dtype)
    dx_other = torch.empty(0 if dtype == other_dtype else x.shape, dtype=other_dtype, device=x.device)
    chunks, tile_rows, chunk = _tile(width, _neighbours(dx, rows_of_dy, rows_of_x))
    programs = min(cdiv(rows, tile_rows), BACKWARD_PROGRAMS * multiprocessors(x.device))
    dtypes = [weight.dtype, weight.dtype, *([] if sum_dtype is None else [sum_dtype])]
    partials = torch.empty((programs, len(dtypes), width), dtype=torch.float32, device=x.device)
    if rows:
        _backward_kernel[(programs,)](
            rows_of_dy, rows_of_dstream, rows_of_x, weight.contiguous(), mean, rstd, dx, dx_other, partials,
            rows, width, rows_of_dy.stride(0), rows_of_dstream.stride(0), rows_of_x.stride(0),
            chunks, tile_rows, chunk, dstream is not None, dtype != other_dtype, sum_dtype is not None,
            num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    dweight, dbias, *sums = sum_partials(partials, dtypes)
    return dx, dx_other, dweight, dbias, sums[0] if sums else torch.empty(0, device=x.device)


def aot_work(name: str, values: Mapping[str, Any]) -> Work:
    """Return the trips of a kernel's loop: the backward pass' over tiles of rows, a share for every program."""
    if name == "_forward_kernel":
        return Work()
    return Work((Loop(-(-values["rows"] // values["ROWS"]) / values["grid"][0]),))


def aot_calls() -> Iterator[Call]:
    """Yield every tile in the dtypes of pure half and full precision and of autocast (a float32 stream)."""
    mixtures = (("fp32", "fp32", "fp32"), ("fp16", "fp16", "fp16"), ("bf16", "bf16", "bf16"), ("bf16", "bf16", "fp32"),
                ("fp16", "fp32", "fp32"), ("bf16", "fp32", "fp32"))  # fmt: skip
    for width, add, (x, stream, weight) in itertools.product((256, 512, 768, 1280, 4096), (False, True), mixtures):
        if add or x == stream:
            yield aot_call(50432, width, add, x, stream, weight)


def aot_call(
    rows: int, width: int, add: bool, x_dtype: str, stream_dtype: str, weight_dtype: str, sums: bool = False
) -> Call:
    """Return a call of the forward and the backward pass, with the residual or alone, with column sums or without."""

    def run() -> None:
        x, stream = tensor(rows, width, dtype=x_dtype), tensor(rows, width, dtype=stream_dtype)
        weight, bias = (tensor(width, dtype=weight_dtype) for _ in range(2))
        if add:
            y, total, mean, rstd = add_forward(x, stream, weight, bias, 1e-5)
            add_backward(
                y, total, total.clone(), weight, mean, rstd, x.dtype, stream.dtype, weight.dtype if sums else None
            )
        else:
            y, mean, rstd = forward(x, weight, bias, 1e-5)
            backward(y, x, weight, mean, rstd)

    label = f"{'add ' if add else ''}layer norm, {x_dtype} to {stream_dtype}, weights {weight_dtype}, width {width}"
    return Call(label, run, quick=(width, x_dtype, weight_dtype) == (768, "bf16", "bf16"))
