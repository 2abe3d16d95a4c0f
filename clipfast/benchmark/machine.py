"""Where a run takes place: the machine, the versions, the commit."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import clipfast
from clipfast.ops.identity import processor_name

_RIVALS = (
    "triton", "open_clip_torch", "transformers", "timm", "torchvision", "openvino", "liger-kernel", "memeff", "inf-cl",
    "siglip-kernel", "webdataset",
)  # fmt: skip
# mallopt's names for them, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def machine_name(device: str) -> str:
    """Return the card's name, or the processor's where the CPU is measured."""
    return torch.cuda.get_device_name() if device == "cuda" else processor_name()


def folder_name(machine: str) -> str:
    """Return a machine's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9]+", "-", machine).strip("-") or "machine"


def details(device: str) -> dict[str, str]:
    """Return threads, cores and versions, as text; what is not there has no entry."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = {
        "threads": str(torch.get_num_threads()),
        "cores": str(cores),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "clipfast": clipfast.__version__,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda or "unknown"
        found["driver"] = (
            _first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "unknown"
        )
    for name in _RIVALS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    tuned = {key: value for key, value in sorted(os.environ.items()) if key.startswith("MALLOC_")}
    if tuned or os.environ.get("LD_PRELOAD"):
        preload = Path(os.environ.get("LD_PRELOAD", "")).name
        found["allocator"] = ", ".join([*(f"{key}={value}" for key, value in tuned.items()), *filter(None, [preload])])
    return found


def keep_pages() -> bool:
    """Let the C library keep the memory that is freed to it, and return whether it will.

    By default glibc gives large blocks back to the system and takes them anew, page by page, at every call; whether it
    does depends on the order of the calls before, and costs a memory-bound operation half of its time again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    never_map, never_trim = mallopt(_M_MMAP_MAX, 0), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    return bool(never_map and never_trim)


def commit_name(folder: Path) -> str:
    """Return the commit of the repository that a folder is in, marked where files were changed.

    ``CLIPFAST_COMMIT`` says it where there is no repository; else it is the version.
    """
    if named := os.environ.get("CLIPFAST_COMMIT"):
        return named
    git = ["git", "-C", str(folder)]
    commit = _first_line([*git, "rev-parse", "--short=10", "HEAD"])
    # another project's repository, with this folder copied into it, says nothing about clipfast
    if commit is None or not _first_line([*git, "ls-files", "harness.py"]):
        return f"v{clipfast.__version__}"
    changed = _first_line([*git, "status", "--porcelain", "--untracked-files=no"])
    return f"{commit}-dirty" if changed else commit


def _first_line(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
