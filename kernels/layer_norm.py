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

# Backward programs a multiprocessor: enough to hide memory's latency, few enough that their partial sums are small
# beside the rows (16 · 132 · 768 floats are 6 MB, ViT-B-16's tokens of 256 pictures 77 MB a tensor)
BACKWARD_PROGRAMS = 8


@functools.cache
def _tile(width: int) -> tuple[int, int, int]:
    """Return the rows and columns of a program's tile and its warps.

    Several narrow rows share a program; a thread then has at least 8 neighbouring elements, the 16 bytes of one load
    in half precision. The tile depends on the width alone: a row's result cannot depend on its batch.
    """
    block = max(256, triton.next_power_of_2(width))
    rows = max(1, 2048 // block)
    return rows, block, rows * block // 256


@jit(do_not_specialize=["rows"])
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


@jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, dstream, x, weight, mean, rstd, dx, dx_other, partials,
    rows, width, dy_stride, dstream_stride, x_stride,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr, TWO_DTYPES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
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
        offsets = row[:, None] * width + column[None, :]
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), mask=inside)
        if TWO_DTYPES:
            tl.store(dx_other + offsets, result.to(dx_other.dtype.element_ty), mask=inside)

    own = partials + tl.program_id(0).to(tl.int64) * 2 * width + column
    tl.store(own, tl.sum(dweight, 0), mask=column < width)
    tl.store(own + width, tl.sum(dbias, 0), mask=column < width)


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
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tile_rows, block, warps = _tile(width)
    if rows:
        _forward_kernel[(cdiv(rows, tile_rows),)](
            rows_of_x, rows_of_residual, weight.contiguous(), bias.contiguous(), y, stream, mean, rstd,
            rows, width, rows_of_x.stride(0), rows_of_residual.stride(0), eps,
            tile_rows, block, residual is not None, num_warps=warps, num_stages=1,
        )  # fmt: skip
    return y, stream, mean, rstd


def backward(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` from that of ``layer_norm(x)``."""
    dx, _, dweight, dbias = _backward(dy, None, x, weight, mean, rstd, x.dtype, x.dtype)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of ``x``, ``residual``, ``weight`` and ``bias`` from those of both outputs.

    The first two are one tensor, and the second is empty, where their dtypes are the same.
    """
    return _backward(dy, dstream, stream, weight, mean, rstd, x_dtype, residual_dtype)


def _backward(
    dy: Tensor,
    dstream: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    other_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_of_dy, rows_of_x = as_rows(dy), as_rows(x)
    rows_of_dstream = rows_of_dy if dstream is None else as_rows(dstream)
    rows, width = rows_of_x.shape
    dx = empty(x, dtype)
    dx_other = torch.empty(0 if dtype == other_dtype else x.shape, dtype=other_dtype, device=x.device)
    tile_rows, block, warps = _tile(width)
    programs = min(cdiv(rows, tile_rows), BACKWARD_PROGRAMS * multiprocessors(x.device))
    partials = torch.empty((programs, 2, width), dtype=torch.float32, device=x.device)
    if rows:
        _backward_kernel[(programs,)](
            rows_of_dy, rows_of_dstream, rows_of_x, weight.contiguous(), mean, rstd, dx, dx_other, partials,
            rows, width, rows_of_dy.stride(0), rows_of_dstream.stride(0), rows_of_x.stride(0),
            tile_rows, block, dstream is not None, dtype != other_dtype, num_warps=warps, num_stages=1,
        )  # fmt: skip
    dweight, dbias = sum_partials(partials, weight.dtype)
    return dx, dx_other, dweight, dbias


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


def aot_call(rows: int, width: int, add: bool, x_dtype: str, stream_dtype: str, weight_dtype: str) -> Call:
    """Return a call of the forward and the backward pass, with the residual or alone."""

    def run() -> None:
        x, stream = tensor(rows, width, dtype=x_dtype), tensor(rows, width, dtype=stream_dtype)
        weight, bias = (tensor(width, dtype=weight_dtype) for _ in range(2))
        if add:
            y, total, mean, rstd = add_forward(x, stream, weight, bias, 1e-5)
            add_backward(y, total, total.clone(), weight, mean, rstd, x.dtype, stream.dtype)
        else:
            y, mean, rstd = forward(x, weight, bias, 1e-5)
            backward(y, x, weight, mean, rstd)

    label = f"{'add ' if add else ''}layer norm, {x_dtype} to {stream_dtype}, weights {weight_dtype}, width {width}"
    return Call(label, run, quick=(width, x_dtype, weight_dtype) == (768, "bf16", "bf16"))
