"""Bias and GELU in one pass, forward and backward; the backward pass needs the pre-activation alone.

The three forms are gates: ``x·Φ(x)``, and with a sigmoid ``x·σ(z(x))``. PyTorch's tanh form is one of the latter,
``½·(1 + tanh u) = σ(2u)``, and is computed as such: tanh has no instruction of its own in float32.
"""

from __future__ import annotations

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
from clipfast.kernels.layer_norm import as_rows, empty
from clipfast.kernels.partial_sums import sum_partials

# A program's tile: 32 elements a thread, 8 neighbours at a time, the 16 bytes of one load in half precision. With fewer
# the erf takes longer than memory: what every thread does beside it, addresses and masks, is for more elements here
ROWS, COLUMNS, WARPS = 8, 512, 4
# as for LayerNorm: what a multiprocessor holds of them, with few partial sums
BACKWARD_PROGRAMS = 3


@triton.jit
def _gate(x, FORM: tl.constexpr):
    """Return GELU's gate at x, and its derivative times x."""
    if FORM == "none":
        gate = 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))
        # the density of the normal distribution: 1/√(2π) · exp(−x²/2)
        return gate, x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    if FORM == "tanh":
        # beyond 100 the gate is 0 or 1; without the bound its slope would be ∞ · 0 where x³ overflows
        near = tl.minimum(tl.maximum(x, -100.0), 100.0)
        # 2·√(2/π) · (x + 0.044715·x³)
        z = 1.5957691216057308 * near * (1 + 0.044715 * near * near)
        slope = 1.5957691216057308 * (1 + 3 * 0.044715 * near * near)
    else:
        z = 1.702 * x
        slope = 1.702
    # σ(|z|) and σ(−|z|), both with all their digits: 1 − σ would lose those of the tail, and exp(−z) can overflow
    small = tl.exp(-tl.abs(z))
    upper = 1 / (1 + small)
    lower = small * upper
    return tl.where(z >= 0, upper, lower), x * (upper * lower) * slope


@jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, bias, y, rows, width, x_stride,
    FORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # neighbouring programs read neighbouring columns
    blocks = tl.cdiv(width, COLUMNS)
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS:
        value += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    gate, _ = _gate(value, FORM)
    tl.store(y + row[:, None] * width + column[None, :], (value * gate).to(y.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["rows", "strips"])
def _backward_kernel(
    dy, x, bias, dx, partials, rows, strips, width, dy_stride, x_stride,
    FORM: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, COLUMNS)
    strip = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    if BIAS:
        shift = tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(strip, tl.cdiv(rows, ROWS), strips):
        row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(dy + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if BIAS:
            value += shift[None, :]
        gate, slope = _gate(value, FORM)
        grad *= gate + slope
        tl.store(dx + row[:, None] * width + column[None, :], grad.to(dx.dtype.element_ty), mask=inside)
        if BIAS:
            dbias += grad
    if BIAS:
        own = partials + strip.to(tl.int64) * width + column
        tl.store(own, tl.sum(dbias, 0), mask=column < width)


def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """Return ``gelu(x + bias)`` like ``x``.

    Args:
        x: ``[..., C]`` in float32, float16 or bfloat16.
        bias: ``[C]``, or None.
        approximate: ``"none"``, ``"tanh"`` or ``"quick"``.
    """
    rows_of_x = as_rows(x)
    rows, width = rows_of_x.shape
    y = empty(x, x.dtype)
    if rows:
        _forward_kernel[(cdiv(rows, ROWS) * cdiv(width, COLUMNS),)](
            rows_of_x, rows_of_x if bias is None else bias.contiguous(), y, rows, width, rows_of_x.stride(0),
            approximate, bias is not None, ROWS, COLUMNS, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and ``bias`` (empty without one) from that of ``gelu(x + bias)``."""
    rows_of_dy, rows_of_x = as_rows(dy), as_rows(x)
    rows, width = rows_of_x.shape
    dx = empty(x, x.dtype)
    blocks = cdiv(width, COLUMNS)
    strips = min(cdiv(rows, ROWS), max(1, BACKWARD_PROGRAMS * multiprocessors(x.device) // blocks))
    partials = torch.empty((strips, 1, width) if bias is not None else 0, dtype=torch.float32, device=x.device)
    if rows:
        _backward_kernel[(strips * blocks,)](
            rows_of_dy, rows_of_x, rows_of_x if bias is None else bias.contiguous(), dx, partials,
            rows, strips, width, rows_of_dy.stride(0), rows_of_x.stride(0),
            approximate, bias is not None, ROWS, COLUMNS, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
    return dx, x.new_empty(0) if bias is None else sum_partials(partials, [bias.dtype])[0]


def aot_work(name: str, values: Mapping[str, Any]) -> Work:
    """Return the trips of a kernel's loop: the backward pass' over tiles of rows, a share for every strip."""
    if name == "_forward_kernel":
        return Work()
    return Work((Loop(-(-values["rows"] // values["ROWS"]) / values["strips"]),))


def aot_calls() -> Iterator[Call]:
    """Yield every form, with and without a bias, in the dtypes that half and full precision mix."""
    mixtures = (("fp32", None), ("fp16", None), ("bf16", None), ("fp32", "fp32"), ("fp16", "fp16"), ("bf16", "bf16"),
                ("fp16", "fp32"), ("bf16", "fp32"))  # fmt: skip
    for form, (x, bias) in itertools.product(("none", "tanh", "quick"), mixtures):
        yield aot_call(50432, 3072, form, x, bias)


def aot_call(rows: int, width: int, form: str, x_dtype: str, bias_dtype: str | None) -> Call:
    """Return a call of :func:`forward` and :func:`backward`."""

    def run() -> None:
        x = tensor(rows, width, dtype=x_dtype)
        bias = None if bias_dtype is None else tensor(width, dtype=bias_dtype)
        forward(x, bias, form)
        backward(torch.empty_like(x), x, bias, form)

    label = f"gelu {form}, {x_dtype}, bias {bias_dtype}, width {width}"
    return Call(label, run, quick=x_dtype == bias_dtype == "bf16")
