"""The two limits of a machine, measured: how fast memory is copied, and how fast matrices are multiplied."""

from __future__ import annotations

import torch

from clipfast.benchmark.results import Limits, Row
from clipfast.benchmark.timing import Clock

_COPIED = {"cuda": 2**30, "cpu": 2**28}  # bytes: many times the last cache
_SIDES = {"cuda": (4096, 8192), "cpu": (1536, 2048)}
_ROUNDS = 5


def measure_limits(device: str) -> Limits:
    """Return the best that a copy and a square product reached, in float32 and in bfloat16.

    Float32 products are float32's own: TF32 stays as PyTorch has it, which is off.
    """
    clock = Clock(device)
    size = _COPIED[device] // 4
    source, target = torch.randn(size, device=device), torch.empty(size, device=device)
    copies = [clock.round(target.copy_, [(source,)], 2)[0] for _ in range(_ROUNDS)]
    rates: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for side in _SIDES[device]:
            a, b = torch.randn(2, side, side, device=device).to(dtype)
            seconds = min(clock.round(torch.mm, [(a, b)], 1)[0] for _ in range(_ROUNDS + 1))
            name = str(dtype).removeprefix("torch.")
            rates[name] = max(rates.get(name, 0.0), 2 * side**3 / seconds / 1e12)
    return Limits(copy_gb_per_s=2 * _COPIED[device] / min(copies) / 1e9, product_tflop_per_s=rates)


def best_of(first: Limits, second: Limits) -> Limits:
    """Return the larger of two measurements of the same machine: a limit is the best that was seen."""
    rates = {name: max(rate, second.product_tflop_per_s[name]) for name, rate in first.product_tflop_per_s.items()}
    return Limits(max(first.copy_gb_per_s, second.copy_gb_per_s), rates)


def limit_seconds(row: Row, limits: Limits) -> float | None:
    """Return the least time that the limits allow for a row's operations and bytes, None where neither is known."""
    times = []
    if row.flops and (rate := limits.product_tflop_per_s.get(row.dtype)):
        times.append(row.flops / rate / 1e12)
    if row.bytes:
        times.append(row.bytes / limits.copy_gb_per_s / 1e9)
    return max(times, default=None)
