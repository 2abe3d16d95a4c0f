"""What this machine and its software are, as far as it decides which implementation is right and fastest.

What was measured on a device (:mod:`clipfast.ops.tuned`) counts where all of it is the same.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

import clipfast
from clipfast.ops import library


def of_device(device: torch.device) -> dict[str, str]:
    """Return what a device is: its type and name; a card's capability and multiprocessors, a CPU's features and cores.

    A CPU's threads are PyTorch's in this process: products that one thread does best may be others than two threads'.
    """
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": card.name,
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": str(card.multi_processor_count),
        }
    if device.type != "cpu":
        return {"type": device.type, "name": device.type}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "type": "cpu",
        "name": processor_name(),
        "features": _cpu_features(),
        "cores": str(cores),
        "threads": str(torch.get_num_threads()),
    }


@functools.cache
def of_software(device_type: str) -> dict[str, str]:
    """Return the versions of what computes on a kind of device, and digests of kernels and op library."""
    found = {"clipfast": clipfast.__version__, "torch": torch.__version__, "library": _library_digest()}
    if device_type == "cuda":
        found["triton"] = _triton_version()
        found["driver"] = _driver()
        found["kernels"] = _kernels_digest()
    return found


@functools.cache
def processor_name() -> str:
    """Return the CPU's name."""
    with suppress(OSError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        if named := re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE):
            return " ".join(named[1].split())
    return platform.processor() or platform.machine() or "unknown"


@functools.cache
def _cpu_features() -> str:
    """Return the instructions that decide who multiplies fastest, as PyTorch uses them."""
    found = [torch.backends.cpu.get_cpu_capability()]
    # named so from PyTorch 2.10 to 2.13; what a version does not tell is not told apart
    for name, ask in (("AVX512_BF16", "_is_avx512_bf16_supported"), ("AMX", "_is_amx_tile_supported")):
        if getattr(torch.cpu, ask, bool)():
            found.append(name)
    return ", ".join(found)


def _triton_version() -> str:
    # asked without the import, which takes a second; PyTorch's nightly builds bring it by the second name
    for name in ("triton", "pytorch-triton"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "none"


def _driver() -> str:
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if version := re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text):
            return version[0]
    newest = library.driver_version()
    return f"CUDA {newest[0]}.{newest[1]}" if newest else "unknown"


def _kernels_digest() -> str:
    with suppress(ImportError):
        import clipfast.kernels

        digest = hashlib.sha256()
        for file in sorted(Path(next(iter(clipfast.kernels.__path__))).glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
        return digest.hexdigest()[:16]
    return "none"


def _library_digest() -> str:
    if library.unavailable() is not None:
        return "none"
    built = library.record().get("sha256")
    return (built or hashlib.sha256(library.path().read_bytes()).hexdigest())[:16]
