"""What a call takes of memory beyond what was there, and what a forward pass keeps."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """Return the most memory that a call took beyond what was taken before it; None where the system does not tell.

    On a GPU it is PyTorch's allocator that counts. On a CPU it is the kernel that counts the process's pages, whoever
    took them: what is below a megabyte is lost in the counting.

    Args:
        call: Called once; it has run before, so that what it keeps for ever is there.
        device: ``"cuda"`` or ``"cpu"``.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # pages that were freed would not be taken anew
        _CLEAR.write_text("5")  # the peak starts again
    except (OSError, AttributeError):
        return None
    before = _pages("VmRSS")
    result = call()
    peak = _pages("VmHWM")
    del result
    return max(0, peak - before)


def _pages(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def saved_bytes(call: Callable[[], object]) -> int:
    """Return what the autograd graph of a call keeps for the backward pass, beside parameters and inputs.

    Every memory is counted once, however many tensors look at it. What a graph keeps outside of saved tensors is not
    seen.
    """
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # an address that is freed could be taken again

    def pack(tensor: Tensor) -> Tensor:
        owner = tensor._base if tensor._base is not None else tensor
        if not owner.is_leaf:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())
