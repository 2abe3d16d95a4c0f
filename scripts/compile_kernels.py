#!/usr/bin/env python3
"""Compile every configuration of every Triton kernel for sm_80, sm_90 and sm_100, and print what each costs.

    python scripts/compile_kernels.py [words of a label or a family ...] [--architectures 80 90 100] [--every 1]

No GPU is needed. The exit status is not 0 where a kernel spills registers, asks for more shared memory than the
architecture has, or is a half-precision attention kernel for sm_90 without its tensor-core instructions (HGMMA).
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

from clipfast.kernels import aot  # noqa: E402  # after the environment

HEADER = (
    f"{'kernel':<86} {'sm':>4} {'registers':>9} {'spills':>6} {'shared':>7} {'HMMA':>5} {'HGMMA':>5} {'tcgen05':>7}"
)


def compile_one(which: tuple[str, int, int]) -> aot.Compiled:
    """Compile the n-th job of a family for an architecture."""
    family, index, architecture = which
    return aot.compile_job(aot.discover()[family][index], architecture)


def main() -> int:
    """Compile, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", help="only kernels whose family and label hold all of these")
    parser.add_argument("--architectures", nargs="+", type=int, default=sorted(aot.SHARED_MEMORY))
    parser.add_argument("--every", type=int, default=1, help="compile each n-th kernel only, for a quick look")
    options = parser.parse_args()

    wanted = [
        (family, index, architecture)
        for family, jobs in aot.discover().items()
        for index, job in enumerate(jobs)
        for architecture in job.architectures
        if architecture in options.architectures and all(word in f"{family} {job.label}" for word in options.words)
    ]
    wanted = wanted[:: options.every]
    start, problems = time.monotonic(), []
    print(HEADER)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for c in pool.map(compile_one, wanted):
            print(
                f"{c.label:<86} {c.architecture:>4} {c.registers:>9} {c.spills:>6} {c.shared_memory:>7} "
                f"{c.hmma:>5} {c.hgmma:>5} {c.tcgen05:>7}",
                flush=True,
            )
            problems += [f"{c.label}, sm_{c.architecture}: {problem}" for problem in c.problems]
    print(f"{len(wanted)} kernels compiled in {time.monotonic() - start:.0f} s, {len(problems)} problems")
    for problem in problems:
        print(f"PROBLEM {problem}")
    return 1 if problems or not wanted else 0


if __name__ == "__main__":
    sys.exit(main())
