"""How the benchmarks time: the parts that all of them share.

Variants run interleaved, so that a clock that changes meets all of them. On a GPU a round is timed by CUDA events
around enough calls to hide the launches, with inputs that rotate through more memory than the L2 cache holds; the
share of bandwidth is that of a copy timed in the same run. On a CPU it is wall time, and the sizes are small: those
runs show that the benchmarks work, and no more.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"
ROUNDS = 15 if ON_GPU else 3
MEMORY = 512 * 2**20 if ON_GPU else 2**20  # what rotating inputs take at least: many times an L2 cache
ROUND_MS = 2.0 if ON_GPU else 1.0  # the least a round lasts

if not ON_GPU:
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine time nothing


def rotating(make: Callable[[], tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """Return sets of random inputs, more of them than a cache holds."""
    first = make()
    size = max(1, sum(t.numel() * t.element_size() for t in first))
    return [first, *(make() for _ in range(min(63, MEMORY // size)))]


def milliseconds(variants: dict[str, Callable[..., object]], inputs: list[tuple[Tensor, ...]]) -> dict[str, float]:
    """Return the median time of one call of each variant."""
    calls = {}
    for name, function in variants.items():
        for arguments in inputs[:2]:
            function(*arguments)  # builds kernels
        calls[name] = max(1, int(ROUND_MS / max(_round(function, inputs, 3), 1e-3)))
    times = {name: [] for name in variants}
    for _ in range(ROUNDS):
        for name, function in variants.items():
            times[name].append(_round(function, inputs, calls[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def _round(function: Callable[..., object], inputs: list[tuple[Tensor, ...]], calls: int) -> float:
    if ON_GPU:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)  # the device waits while the host queues the first calls
        start.record()
    else:
        began = time.perf_counter()
    for i in range(calls):
        function(*inputs[i % len(inputs)])
    if not ON_GPU:
        return (time.perf_counter() - began) * 1e3 / calls
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def paired(sides: dict[str, Callable[[], object] | None], rounds: int) -> dict[str, list[float]]:
    """Return the wall times in seconds of every side that is there, taken in turn, a round at a time."""
    present = {name: call for name, call in sides.items() if call is not None}
    times: dict[str, list[float]] = {name: [] for name in present}
    for round_ in range(rounds + 1):
        for name, call in present.items():
            began = time.perf_counter()
            call()
            if ON_GPU:
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                times[name].append(time.perf_counter() - began)
    return times


def report_paired(
    capsys: object,
    title: str,
    times: dict[str, list[float]],
    sides: dict[str, object],
    items: int,
    op: str | None = None,
    **facts: dict[str, float],
) -> None:
    """Report :func:`paired` times: items a second, and each side's time over the first one's in the same round.

    Args:
        capsys: pytest's.
        title: What was timed.
        times: As :func:`paired` gives them.
        sides: All sides; those without times are named as not installed.
        items: How many items one call computes.
        op: The op that was timed, for the results' file.
        **facts: More numbers a side.
    """
    first = next(iter(times.values()))
    ratios = {
        name: statistics.median(t / mine for t, mine in zip(each, first, strict=True)) for name, each in times.items()
    }
    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    missing = [name for name in sides if name not in times]
    tuned = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"}
    title = f"{title}, {torch.get_num_threads()} threads"
    report(capsys, title, medians, op=op, ratios=ratios, missing=missing, rounds=len(first), allocator=tuned, **facts)
    with capsys.disabled():
        print(f"  allocator: {tuned or 'defaults'}; {len(first)} rounds")
        for name, ratio in ratios.items():
            line = f"  {name:<28} {items / medians[name] * 1e3:9.2f} /s {ratio:6.2f} × {next(iter(times))}'s time"
            for fact, values in facts.items():
                line += f", {fact} {values[name]:.6g}" if name in values else ""
            print(line)
        for name in missing:
            print(f"  {name:<28} not installed")


def copy_bandwidth() -> float:
    """Return the bytes a second that a copy of a large tensor reads and writes, in GB/s."""
    inputs = rotating(lambda: tuple(torch.randn(2, MEMORY // 16, device=DEVICE)))
    return 2 * 4 * (MEMORY // 16) / milliseconds({"copy": lambda a, b: a.copy_(b)}, inputs)["copy"] / 1e6


def with_backward(function: Callable[..., object], grads: tuple[Tensor, ...]) -> Callable[..., object]:
    """Return a function that runs ``function`` and its backward pass for every input."""

    def both(*inputs: Tensor) -> object:
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, leaves, grads)

    return both


def assert_close(variants: dict[str, Callable[..., object]], inputs: tuple[Tensor, ...]) -> None:
    """Check that every variant computes what the first computes, before anything is timed."""
    expected = None
    for name, function in variants.items():
        found = function(*inputs)
        found = found if isinstance(found, tuple) else (found,)
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            scale = b.float().abs().max()
            error = float((a.float() - b.float()).abs().max() / scale)
            assert error < 32 * torch.finfo(b.dtype).eps, f"{name}: {error:.1e} from {next(iter(variants))}"


def report(capsys: object, title: str, times: dict[str, float], moved: int | None = None, **facts: object) -> None:
    """Print a line a variant, and add the times to the file that ``CLIPFAST_RESULTS`` names.

    ``moved`` is the bytes that the op must read and write at least; with it, GB/s and the share of a copy's are given.
    """
    entry = {"title": title, "ms": times, "bytes": moved, **facts}
    copied = copy_bandwidth() if moved is not None and ON_GPU else None
    lines = [f"\n{title}"]
    for name, ms in sorted(times.items(), key=lambda item: item[1]):
        line = f"  {name:<28} {ms:9.4f} ms"
        if moved is not None:
            line += f" {moved / ms / 1e6:8.1f} GB/s"
        if copied is not None:
            line += f" {moved / ms / 1e6 / copied:5.0%} of a copy"
        lines.append(line)
    entry["copy_gb_per_s"] = copied
    with capsys.disabled():
        print("\n".join(lines))
    if os.environ.get("CLIPFAST_RESULTS"):
        with Path(os.environ["CLIPFAST_RESULTS"]).open("a") as file:
            file.write(json.dumps(entry) + "\n")
