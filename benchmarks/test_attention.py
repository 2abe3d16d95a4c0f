"""Attention at CLIP's lengths, beside every backend of PyTorch's scaled_dot_product_attention.

pytest benchmarks/test_attention.py
"""

from __future__ import annotations

import pytest
import torch
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
from torch.nn.attention import SDPBackend, sdpa_kernel

from clipfast import ops
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row

HEADS, HEAD_DIM = 12, 64
# the series that differs by tokens alone: B-32, B-16, L-14, L-14-336; and the causal text tower beside it
TOKENS = [50, 197, 257, 577]
CASES = [(tokens, False) for tokens in TOKENS] + [(77, True)]
BATCH = by_scale(smoke=1, short=4, full=16, gpu=128)
SDPA = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}


def sdpa(kind, causal):
    """PyTorch's attention on one of its backends, by the same views of the packed projection."""

    def run(qkv):
        q, k, v = qkv.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(kind):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return out.transpose(1, 2).flatten(-2)

    return run


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward and backward"])
@pytest.mark.parametrize(("tokens", "causal"), CASES)
def test_attention(tokens, causal, backward, benchmark):
    width = HEADS * HEAD_DIM

    def ours(qkv):
        return ops.attention(qkv, HEADS, causal=causal)

    sides = {"clipfast": ours}
    if ON_GPU:
        sides["clipfast, triton"] = on_backend("triton", ours)
    sides["PyTorch"] = on_backend("reference", ours)
    sides |= {name: sdpa(kind, causal) for name, kind in SDPA.items()}
    if not ON_GPU:
        sides |= dict.fromkeys(("SDPA cuDNN", "SDPA memory-efficient"), "needs a GPU")
    grads = (torch.randn(BATCH, tokens, width, device=DEVICE, dtype=DTYPE),)
    inputs = rotating(lambda: (torch.randn(BATCH, tokens, 3 * width, device=DEVICE, dtype=DTYPE),))
    exact = exactly(ours, inputs[0], grads if backward else None)
    sides = in_direction(sides, grads if backward else None)
    pairs = tokens * (tokens + 1) / 2 if causal else tokens**2
    direction = "forward and backward" if backward else "forward"
    shape = f"[{BATCH}, {tokens}, {HEADS}, {HEAD_DIM}]{', causal' * causal}"
    row = Row(
        op="attention",
        name=f"attention, {direction}, {shape}, {dtype_name(DTYPE)}",
        label=f"{tokens} tokens{', causal' * causal}",
        direction=direction,
        dtype=dtype_name(DTYPE),
        unit="sequences",
        items=BATCH,
        # two products forward; five backward, where the scores are computed again
        flops=(14 if backward else 4) * BATCH * HEADS * pairs * HEAD_DIM,
        # forward: qkv, out; backward: qkv, out, its gradient, that of qkv
        bytes=BATCH * tokens * width * DTYPE.itemsize * (4 + backward * 8),
        series=None if causal else f"attention, {direction}",
        axis=None if causal else "tokens",
        at=None if causal else tokens,
        law={} if causal else {"time": 2, "memory": 1},
        facts=op_facts("attention", *inputs[0], HEADS, causal=causal, backward=backward),
    )
    measure(benchmark, row, sides, inputs, oracle=Oracle(exact, "PyTorch"), saves=backward)
