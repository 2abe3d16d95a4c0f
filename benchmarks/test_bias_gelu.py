"""Bias and GELU, each form, beside PyTorch and PyTorch compiled.

pytest benchmarks/test_bias_gelu.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DEVICE,
    DTYPE,
    ON_GPU,
    by_scale,
    dtype_name,
    exactly,
    in_direction,
    measure,
    on_backend,
    op_facts,
    rotating,
)

from clipfast import ops
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row

# the hidden rows of an image and their width
SIZES = {"B-32": (50, 3072), "B-16": (197, 3072), "L-14": (257, 4096)}
BATCH = by_scale(smoke=1, short=16, full=32, gpu=256)
CASES = by_scale(smoke=["B-32"], short=["B-32"], full=list(SIZES), gpu=list(SIZES))
FORMS = by_scale(smoke=["none"], short=["none", "quick"], full=["none", "tanh", "quick"], gpu=["none", "tanh", "quick"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("size", CASES)
def test_bias_gelu(size, backward, form, benchmark):
    tokens, width = SIZES[size]
    rows = BATCH * tokens

    def reference(x, bias):
        x = x + bias
        return x * torch.sigmoid(1.702 * x) if form == "quick" else F.gelu(x, approximate=form)

    def ours(x, bias):
        return ops.bias_gelu(x, bias, form)

    def make():
        x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
        return x, torch.randn(width, device=DEVICE, dtype=DTYPE)

    sides = {"clipfast": ours}
    if ON_GPU:
        sides["clipfast, triton"] = on_backend("triton", ours)
    sides |= {"PyTorch": reference, "torch.compile": torch.compile(reference, fullgraph=True)}
    inputs = rotating(make)
    grads = (torch.randn(rows, width, device=DEVICE, dtype=DTYPE),)
    exact = exactly(reference, inputs[0], grads if backward else None)
    sides = in_direction(sides, grads if backward else None)
    direction = "forward and backward" if backward else "forward"
    row = Row(
        op="bias_gelu",
        name=f"bias_gelu, {form}, {direction}, {rows} rows of {width}, {dtype_name(DTYPE)}",
        label=f"{form}, {size}",
        direction=direction,
        dtype=dtype_name(DTYPE),
        unit="rows",
        items=rows,
        # an element: the sum, some ten for the function, as many for its derivative
        flops=rows * width * (11 + backward * 12),
        # forward: x, y; backward: dy, x, dx
        bytes=(5 if backward else 2) * rows * width * DTYPE.itemsize,
        facts=op_facts("bias_gelu", *inputs[0], form, backward=backward),
    )
    measure(benchmark, row, sides, inputs, oracle=Oracle(exact, "PyTorch"), saves=backward)
