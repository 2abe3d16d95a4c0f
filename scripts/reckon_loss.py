#!/usr/bin/env python3
"""Compile the losses' CUDA kernels and reckon what they take on an H100; prints the tables of docs/contrastive_loss.md.

    python scripts/reckon_loss.py

Needs nvcc, and no GPU: every figure is predicted.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from clipfast.benchmark.reckoning import cuda, losses, sass

ROOT = Path(__file__).parent.parent


def compile_for(architecture: str) -> dict[str, sass.Kernel]:
    """Return the kernels of csrc/cuda for an architecture."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    flags = [f"-I{torch / 'include'}", f"-I{ROOT / 'csrc'}", "-DTORCH_TARGET_VERSION=0x020a000000000000ull"]
    return cuda.compile_source(ROOT / "csrc" / "cuda" / "contrastive_loss.cu", architecture, flags)


if __name__ == "__main__":
    losses.report(compile_for("90a"))
