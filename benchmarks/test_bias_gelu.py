"""Bias and GELU, each form: kernel, PyTorch, and PyTorch compiled.

pytest benchmarks/test_bias_gelu.py
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, ON_GPU, assert_close, milliseconds, report, rotating, with_backward

import clipfast
from clipfast import ops
from clipfast.ops import dispatch

# the hidden rows of ViT-B-32, B-16 and L-14 at 256 pictures
CASES = [(256 * 50, 3072), (256 * 197, 3072), (256 * 257, 4096)] if ON_GPU else [(300, 512)]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@pytest.mark.parametrize("form", ["none", "tanh", "quick"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("rows", "width"), CASES)
def test_bias_gelu(rows, width, backward, form, capsys):
    def reference(x, bias):
        x = x + bias
        return x * torch.sigmoid(1.702 * x) if form == "quick" else F.gelu(x, approximate=form)

    def kernel(x, bias):
        with clipfast.backend("triton"):
            return ops.bias_gelu(x, bias, form)

    variants = {"torch": reference}
    if ON_GPU:
        variants |= {"torch.compile": torch.compile(reference, fullgraph=True), "triton": kernel}

    def make():
        x = torch.randn(rows, width, device=DEVICE, dtype=DTYPE)
        return x, torch.randn(width, device=DEVICE, dtype=DTYPE)

    inputs = rotating(make)
    if backward:
        grads = (torch.randn(rows, width, device=DEVICE, dtype=DTYPE),)
        variants = {name: with_backward(function, grads) for name, function in variants.items()}
    assert_close(variants, inputs[0])
    times = milliseconds(variants, inputs)
    title = f"bias_gelu {form}, {'forward and backward' if backward else 'forward'}, {rows} rows of {width}, {DTYPE}"
    # forward: x, y; backward: dy, x, dx
    moved = (5 if backward else 2) * rows * width * DTYPE.itemsize
    shape = dispatch.shape_class("bias_gelu", *inputs[0], form)
    report(capsys, title, times, moved, op="bias_gelu", shape_class=shape, backward=backward)
