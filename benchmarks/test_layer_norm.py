"""LayerNorm and residual + LayerNorm, beside PyTorch, PyTorch compiled, and Liger.

pytest benchmarks/test_layer_norm.py
"""

from __future__ import annotations

import pytest
import torch
from harness import (
    DEVICE,
    DTYPE,
    ON_GPU,
    absent,
    by_scale,
    dtype_name,
    exactly,
    in_direction,
    measure,
    op_facts,
    rotating,
)

import clipfast
from clipfast import ops
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row

# rows and width: the text tower, B-32, B-16, L-14 and H-14
SIZES = {"text": (77, 512), "B-32": (50, 768), "B-16": (197, 768), "L-14": (257, 1024), "H-14": (257, 1280)}
BATCH = by_scale(smoke=1, short=16, full=32, gpu=256)
CASES = by_scale(smoke=["B-32"], short=["B-32", "L-14"], full=list(SIZES), gpu=list(SIZES))
EPS = 1e-5


def liger():
    if reason := absent("liger_kernel", gpu=True):
        return reason
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, weight, bias: liger_layer_norm(x, weight, bias, EPS)


@pytest.mark.parametrize("add", [False, True], ids=["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize("size", CASES)
def test_layer_norm(size, backward, add, benchmark):
    tokens, width = SIZES[size]
    rows, op = BATCH * tokens, "add_layer_norm" if add else "layer_norm"

    def reference(*inputs):
        x, weight, bias = inputs[0], *inputs[-2:]
        stream = x + inputs[1] if add else x
        y = torch.nn.functional.layer_norm(stream, (width,), weight, bias, EPS)
        return (y, stream) if add else y

    def ours(*inputs):
        return getattr(ops, op)(*inputs, EPS)

    def kernel(*inputs):
        with clipfast.backend("triton"):
            return ours(*inputs)

    def make():
        tensors = torch.randn(1 + add, rows, width, device=DEVICE, dtype=DTYPE).unbind(0)
        return (*tensors, *torch.randn(2, width, device=DEVICE, dtype=DTYPE).unbind(0))

    sides = {"clipfast": ours}
    if ON_GPU:
        sides["clipfast, triton"] = kernel
    sides |= {"PyTorch": reference, "torch.compile": torch.compile(reference, fullgraph=True)}
    if not add:
        sides["Liger"] = liger()
    inputs = rotating(make)
    grads = torch.randn(1 + add, rows, width, device=DEVICE, dtype=DTYPE).unbind(0)
    exact = exactly(reference, inputs[0], grads if backward else None)
    sides = in_direction(sides, grads if backward else None)
    direction = "forward and backward" if backward else "forward"
    row = Row(
        op="layer_norm",
        name=f"{op}, {direction}, {rows} rows of {width}, {dtype_name(DTYPE)}",
        label=f"{'residual + ' * add}LayerNorm, {size}",
        direction=direction,
        dtype=dtype_name(DTYPE),
        unit="rows",
        items=rows,
        # an element: mean 1, variance 3, scaling 4, the sum 1; backward three products and their sums
        flops=rows * width * (8 + add + backward * 14),
        # forward: x, y and with add residual, stream; backward: dy, x, dx and with add dstream
        bytes=((4 if add else 2) + backward * (4 if add else 3)) * rows * width * DTYPE.itemsize,
        facts=op_facts(op, *inputs[0], backward=backward),
    )
    measure(benchmark, row, sides, inputs, oracle=Oracle(exact, "PyTorch"), saves=backward)
