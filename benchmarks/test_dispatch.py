"""What a dispatched call costs over the implementation that serves it, on tensors so small that nothing else counts.

    pytest benchmarks/test_dispatch.py

Both sides make the same calls in a Python loop: clipfast's public function, and the implementation that the choice
falls on, with its arguments made ready. What is between them is the choice, and what the public function does to its
arguments: checks, views and the offsets' values. That is written out in µs, and is ``own_us`` among a row's facts: the
fastest of many short loops by the fastest, since a busy machine only adds.
"""

from __future__ import annotations

import time

import pytest
import torch
from harness import DEVICE, SESSION, by_scale, dtype_name, measure

from clipfast import ops
from clipfast.benchmark.results import Row
from clipfast.ops import dispatch
from clipfast.ops.encoder import BlockWeights, PackedEncoder, encode

CALLS = 100
REPEATS = by_scale(smoke=3, short=300, full=1000)
DTYPE = torch.float32


def _encoder() -> PackedEncoder:
    shapes = ((64,), (64,), (192, 64), (192,), (64, 64), (64,), (64,), (64,), (256, 64), (256,), (64, 256), (64,))
    weights = [0.1 * torch.randn(shape) for shape in shapes]
    return PackedEncoder([BlockWeights(*(tuple(weights[i : i + 2]) for i in range(0, 12, 2)))], 2, False, "none", 1e-5)


def _calls():
    """Return the public functions with their arguments, by what they are; keywords are those of the function."""
    x, one = torch.randn(2, 64, device=DEVICE), torch.ones(64, device=DEVICE)
    qkv = torch.randn(1, 4, 192, device=DEVICE)
    # two sequences of 16 tokens of one length, as images are
    tokens, offsets = torch.randn(32, 64), torch.tensor([0, 16, 32])
    return {
        "layer_norm": (ops.layer_norm, (x, one, one, 1e-5), {}),
        "add_layer_norm": (ops.add_layer_norm, (x, x, one, one, 1e-5), {}),
        "bias_gelu": (ops.bias_gelu, (x, one, "none"), {}),
        "attention": (ops.attention, (qkv.view(1, 4, 3, 2, 32), 2), {}),
        "attention, [B, N, 3·H·D]": (ops.attention, (qkv, 2), {}),
        "attention, packed": (ops.attention, (qkv[0], 2), {"cu_seqlens": torch.tensor([0, 1, 4])}),
        "single_query_attention": (ops.single_query_attention, (x[:1], x[None], x[None], 2), {}),
        "encoder": (encode, (tokens, _encoder()), {"cu_seqlens": offsets}),
    }


def _times(*loops):
    """Return the host's time of each loop, one behind the other."""
    times = []
    for loop in loops:
        start = time.perf_counter()
        loop()
        times.append(time.perf_counter() - start)
    return times


@pytest.mark.parametrize("what", list(_calls()))
def test_dispatch(what, benchmark):
    function, arguments, keywords = _calls()[what]
    op = what.partition(",")[0]
    if op == "encoder" and DEVICE != "cpu":
        pytest.skip("encoders are packed for the CPU")

    def ours():
        for _ in range(CALLS):
            function(*arguments, **keywords)

    with torch.no_grad():
        run, request = dispatch.serving(op, *arguments, **keywords)

        def alone():
            for _ in range(CALLS):
                run(*request)

        def own(row):
            fastest = [min(times) for times in zip(*(_times(ours, alone) for _ in range(REPEATS)), strict=True)]
            microseconds = (fastest[0] - fastest[1]) / CALLS * 1e6
            SESSION.write(f"  {what}: {microseconds:.2f} µs a call over the implementation")
            return {"own_us": microseconds}

        row = Row(
            op="dispatch",
            name=f"dispatch, {what}, {CALLS} calls, {dtype_name(DTYPE)}",
            label=what,
            direction="forward",
            dtype=dtype_name(DTYPE),
            unit="calls",
            items=CALLS,
        )
        measure(benchmark, row, {"clipfast": ours, "the implementation alone": alone}, facts=own)
