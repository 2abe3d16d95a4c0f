"""Attention at CLIP's lengths: every backend of PyTorch's scaled_dot_product_attention, and ours where there is one.

pytest benchmarks/test_attention.py
"""

from __future__ import annotations

import pytest
import torch
from harness import DEVICE, ON_GPU, assert_close, milliseconds, report, rotating, with_backward
from torch.nn.attention import SDPBackend, sdpa_kernel

import clipfast
from clipfast import ops
from clipfast.ops import dispatch

# batch, tokens, heads, head_dim, causal: B-32, the text tower, B-16, L-14, L-14-336
CASES = [
    (512, 50, 12, 64, False),
    (512, 77, 8, 64, True),
    (256, 197, 12, 64, False),
    (128, 257, 16, 64, False),
    (64, 577, 16, 64, False),
]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
if not ON_GPU:
    CASES = [(2, 50, 2, 32, False), (2, 77, 2, 32, True)]
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("batch", "tokens", "heads", "head_dim", "causal"), CASES)
def test_attention(batch, tokens, heads, head_dim, causal, backward, capsys):
    width = heads * head_dim
    inputs = rotating(lambda: (torch.randn(batch, tokens, 3 * width, device=DEVICE, dtype=DTYPE),))

    def forced(backend):
        def run(qkv):
            with clipfast.backend(backend):
                return ops.attention(qkv, heads, causal=causal)

        return run

    def sdpa(kind):
        def run(qkv):
            with sdpa_kernel(kind):
                return forced("torch")(qkv)

        return run

    grads = (torch.randn(batch, tokens, width, device=DEVICE, dtype=DTYPE),)
    variants = {"SDPA as PyTorch chooses": forced("torch")}
    if ON_GPU:
        variants |= {name: sdpa(kind) for name, kind in SDPA.items()}
        if any(i.backend == "triton" for i in dispatch._ops["attention"].implementations):
            variants["triton"] = forced("triton")
    if backward:
        variants = {name: with_backward(function, grads) for name, function in variants.items()}
    for name in list(variants):
        try:
            variants[name](*inputs[0])
        except RuntimeError:  # PyTorch has no such kernel for this call
            del variants[name]
    assert_close(variants, inputs[0])
    times = milliseconds(variants, inputs)
    title = f"attention, {'forward and backward' if backward else 'forward'}, [{batch}, {tokens}, {heads}, {head_dim}]"
    # forward: qkv, out; backward: qkv, out, its gradient, that of qkv
    moved = batch * tokens * width * DTYPE.itemsize * (4 + backward * 8)
    shape = dispatch.shape_class("attention", *inputs[0], heads, causal=causal)
    causally = ", causal" if causal else ""
    report(capsys, f"{title}{causally}, {DTYPE}", times, moved, op="attention", shape_class=shape, backward=backward)
