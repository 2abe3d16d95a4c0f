#!/usr/bin/env python3
"""Compile every configuration of every Triton kernel, as it would be launched, and reckon what each costs.

    python scripts/compile_kernels.py [words of a label or a family ...] [--architectures 80 90 100 120] [--every 1]

No GPU is needed; every figure is predicted from machine code (docs/kernels.md has the formulas). Clocks are a
multiprocessor's for one program. The exit status is not 0 where a kernel asks for more shared memory than the
architecture has, where spilled registers cost more than a twentieth of its time, or where a half-precision attention
kernel for sm_90 is without its tensor-core instructions (HGMMA).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

# interpreted kernels cannot be compiled
os.environ.pop("TRITON_INTERPRET", None)
warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")

from clipfast.benchmark.reckoning import report  # noqa: E402  # after the environment
from clipfast.kernels import aot  # noqa: E402


def reckon_one(which: tuple[tuple[int, ...], str, int]) -> report.Row:
    """Compile and reckon the n-th job of a family."""
    architectures, family, index = which
    return report.row(aot.discover(architectures)[family][index])


def main() -> int:
    """Compile, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only kernels whose family and label hold all of these")
    parser.add_argument("--architectures", nargs="+", type=int, default=[80, 90, 100, 120], choices=aot.SHARED_MEMORY)
    parser.add_argument("--every", type=int, default=1, help="compile each n-th kernel only, for a quick look")
    options = parser.parse_args()

    architectures = tuple(options.architectures)
    wanted = [
        (architectures, family, index)
        for family, jobs in aot.discover(architectures).items()
        for index, job in enumerate(jobs)
        if all(word in f"{family} {job.label}" for word in options.words)
    ]
    wanted = wanted[:: options.every]
    start, problems = time.monotonic(), []
    print(report.HEADER)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row in pool.map(reckon_one, wanted):
            print(row.line, flush=True)
            problems += row.problems
    print(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
