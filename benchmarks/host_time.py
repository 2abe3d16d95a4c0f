#!/usr/bin/env python3
"""The host's time of a call that Triton's kernels serve, without a card: the driver is mocked, and nothing computes.

    python benchmarks/host_time.py

Tensors are the CPU's and small. What is timed is all that Python and PyTorch do for a call: checks, the choice,
autograd, the operator, the memory of results and the launches. The driver's own launch (some 3 µs) and the look at
pointers that Triton's launcher takes in C are not. Beside it, the same with every launch as Triton makes it, and
PyTorch's operators, whose times hold their kernels' on tensors of 256 elements. It is the processor's time, the least
of many short loops: a busy machine only adds.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import mocked_driver  # before whoever imports Triton
import torch
import torch.nn.functional as F
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.kernels import launch
from clipfast.ops import fallback, kernel_ops, trust

CALLS, REPEATS = 50, 150


def _attention(x: Tensor) -> Tensor:
    parts = x.unflatten(-1, (3, 2, -1)).unbind(2)
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in parts)).transpose(1, 2).flatten(2)


def _add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.layer_norm(total, (64,), weight, bias), total


def cases() -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]]:
    """Return clipfast's function, PyTorch's and their tensors, by the op."""
    x, one = torch.randn(4, 64), torch.ones(64)
    return {
        "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (64,), w, b), (x, one, one)),
        "add_layer_norm": (ops.add_layer_norm, _add_layer_norm, (x, x, one, one)),
        "bias_gelu": (ops.bias_gelu, lambda x, b: F.gelu(x + b), (x, one)),
        "attention": (lambda x: ops.attention(x, 2), _attention, (torch.randn(1, 4, 192).bfloat16(),)),
    }


def fastest(function: Callable[[], object]) -> float:
    """Return the microseconds of a call."""
    times = []
    function()
    gc.disable()
    for _ in range(REPEATS):
        mocked_driver.launches.clear()
        start = time.process_time()
        for _ in range(CALLS):
            function()
        times.append((time.process_time() - start) / CALLS)
    gc.enable()
    return min(times) * 1e6


def times(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[float, float, float]:
    """Return the microseconds of a call without gradients, of one with, and of both passes."""
    with torch.no_grad():
        alone = fastest(lambda: function(*tensors))
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(*leaves)
    gradients = [torch.ones_like(o) for o in (out if isinstance(out, tuple) else (out,))]

    def both() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, gradients)

    return alone, fastest(lambda: function(*leaves)), fastest(both)


@contextmanager
def as_triton_launches() -> Iterator[None]:
    """Let Triton make every launch."""
    kernel = launch.Kernel._launch
    launch.Kernel._launch = lambda self, grid, *a, **named: self.run(*a, grid=grid, warmup=False, **named)
    try:
        yield
    finally:
        launch.Kernel._launch = kernel


def main() -> None:
    """Print a line for each op."""
    torch.set_num_threads(1)
    # as on a card where kernels have passed their checks
    kernel_ops._unavailable = lambda *_: None
    trust.is_required = lambda device: True
    trust._decide = lambda op, device, trial: trust._verdicts.setdefault((device, trial.name, trial.key))
    print(f"{'µs a call':<16}{'':<18}{'no gradients':>14}{'forward':>10}{'+ backward':>12}")
    for name, (ours, pytorchs, tensors) in cases().items():
        with clipfast.backend("triton"):
            found = {"clipfast": times(ours, tensors)}
            with as_triton_launches():
                found["as Triton launches"] = times(ours, tensors)
        found["PyTorch"] = times(pytorchs, tensors)
        for who, (alone, forward, both) in found.items():
            print(f"{name:<16}{who:<18}{alone:>14.1f}{forward:>10.1f}{both:>12.1f}", flush=True)
    assert not fallback.failures(), fallback.failures()
    from clipfast.kernels import layer_norm

    x, rows = torch.zeros(4, 64), torch.zeros(4)
    arguments = (x, x, x[0], x[0], x, x, rows, rows, 4, 64, 64, 64, 1e-5, 1, 8, 256, False)

    def run() -> None:
        layer_norm._forward_kernel[(1,)](*arguments, num_warps=4, num_stages=1)

    quick = fastest(run)
    with as_triton_launches():
        print(f"{'one launch':<16}clipfast {quick:.1f}, Triton {fastest(run):.1f}")


if __name__ == "__main__":
    main()
