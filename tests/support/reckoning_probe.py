"""Kernels whose instructions are known, reckoned in a process of their own (``tests/benchmark/test_reckoning.py``).

``python reckoning_probe.py`` prints, as JSON, what is reckoned of each.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from clipfast.benchmark.reckoning.launches import reckon_job
from clipfast.kernels import aot, partial_sums

warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")


@triton.jit
def counted(x, y, trips, BLOCK: tl.constexpr, SUMS: tl.constexpr):
    place = tl.arange(0, BLOCK)
    value = tl.load(x + place)
    for trip in range(trips):
        for _ in tl.static_range(SUMS):
            value = tl.inline_asm_elementwise("fma.rn.f32 $0, $1, $1, $1;", "=f,f", [value], tl.float32, False, 1)
        value = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [value], tl.float32, False, 1)
        tl.store(y + trip * BLOCK + place, value)


@triton.jit
def product(a, b, c, terms, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, terms, K):
        total = tl.dot(tl.load(a + m * terms + start + k[None, :]), tl.load(b + (start + k[:, None]) * N + n), total)
    tl.store(c + m * N + n, total)


def aot_work(name: str, values: Mapping[str, Any]) -> aot.Work:
    trips = values["trips"] if name == "counted" else values["terms"] // values["K"]
    return aot.Work((aot.Loop(trips),))


def launch_counted(trips: int, block: int) -> None:
    x, y = aot.tensor(block, dtype="fp32"), aot.tensor(trips, block, dtype="fp32")
    counted[(7,)](x, y, trips, block, 48, num_warps=4)


def launch_product(m: int, n: int, terms: int) -> None:
    a, b, c = aot.tensor(m, terms, dtype="bf16"), aot.tensor(terms, n, dtype="bf16"), aot.tensor(m, n, dtype="fp32")
    product[(9,)](a, b, c, terms, m, n, 64, num_warps=4)


def launch_unrolled(programs: int, columns: int) -> None:
    """Launch a kernel whose loop ptxas unrolls four times."""
    partial_sums.PARTIALS, partial_sums.COLUMNS, partial_sums.WARPS = 64, 32, 8
    partials = aot.tensor(programs, 1, columns, dtype="fp32")
    partial_sums.sum_partials(partials, [partials.dtype])


def reckoned(run: Any, architecture: int, *arguments: int) -> dict[str, Any]:
    found = reckon_job(aot.capture(aot.Call("probe", lambda: run(*arguments)), architecture)[0])
    return {"instructions": found.cost.instructions, "clocks": found.cost.clocks, "resident": found.cost.resident}


def refused() -> str:
    """Return what is said where the loops given are not those of the machine code."""
    job = aot.capture(aot.Call("probe", lambda: launch_counted(10, 256)), 90)[0]
    globals()["aot_work"] = lambda name, values: aot.Work()
    try:
        reckon_job(job)
    except ValueError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(
        json.dumps(
            {
                "counted": reckoned(launch_counted, 90, 1000, 256),
                "wide": reckoned(launch_counted, 90, 1000, 512),
                "product 90": reckoned(launch_product, 90, 128, 128, 4096),
                "product 100": reckoned(launch_product, 100, 128, 256, 4096),
                "product 80": reckoned(launch_product, 80, 64, 64, 4096),
                "unrolled": reckoned(launch_unrolled, 90, 64 * 100, 32),
                "refused": refused(),
            }
        )
    )
