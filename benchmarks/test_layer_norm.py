"""LayerNorm and residual + LayerNorm: kernels, PyTorch, and PyTorch compiled.

pytest benchmarks/test_layer_norm.py
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, ON_GPU, assert_close, milliseconds, report, rotating, with_backward

import clipfast
from clipfast import ops
from clipfast.ops import dispatch

# ViT-B-32, B-16, L-14 and H-14 at 256 pictures; narrow for text
CASES = [(256 * 77, 512), (256 * 50, 768), (256 * 197, 768), (256 * 257, 1024), (256 * 257, 1280)]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
if not ON_GPU:
    CASES = [(300, 512)]


def make(rows, width):
    x, residual = torch.randn(2, rows, width, device=DEVICE, dtype=DTYPE)
    weight, bias = torch.randn(2, width, device=DEVICE, dtype=DTYPE)
    return x, residual, weight, bias


@pytest.mark.parametrize("add", [False, True], ids=["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("rows", "width"), CASES)
def test_layer_norm(rows, width, backward, add, capsys):
    op = "add_layer_norm" if add else "layer_norm"

    def reference(*inputs):
        x, weight, bias = inputs[0], *inputs[-2:]
        stream = x + inputs[1] if add else x
        y = torch.nn.functional.layer_norm(stream, (width,), weight, bias, 1e-5)
        return (y, stream) if add else y

    def kernel(*inputs):
        with clipfast.backend("triton"):
            return getattr(ops, op)(*inputs)

    variants = {"torch": reference}
    if ON_GPU:
        variants |= {"torch.compile": torch.compile(reference, fullgraph=True), "triton": kernel}
    inputs = rotating(lambda: tuple(t for i, t in enumerate(make(rows, width)) if add or i != 1))
    if backward:
        grads = torch.randn(2, rows, width, device=DEVICE, dtype=DTYPE).unbind(0)[: 2 if add else 1]
        variants = {name: with_backward(function, grads) for name, function in variants.items()}
    assert_close(variants, inputs[0])
    times = milliseconds(variants, inputs)
    # forward: x, y and with add residual, stream; backward: dy, x, dx and with add dstream
    tensors = (4 if add else 2) + backward * (4 if add else 3)
    shape = dispatch.shape_class(op, *inputs[0])
    title = f"{op}, {'forward and backward' if backward else 'forward'}, {rows} rows of {width}, {DTYPE}"
    moved = tensors * rows * width * DTYPE.itemsize
    report(capsys, title, times, moved, op=op, shape_class=shape, backward=backward)
