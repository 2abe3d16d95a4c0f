"""What is said where the op library is missing: why it is, what that costs, and what to run."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings

import torch

from clipfast import installation
from clipfast.ops import library
from clipfast.ops.switches import FallbackWarning, is_wanted

_COST = "inference on the CPU and the losses run in PyTorch, which is right but slower"
_told = False


def tell() -> None:
    """Warn, once a process, where the op library cannot be used and something can be done about it.

    The first model asks, or a loss without one. Nothing is said where a backend or ``CLIPFAST_NO_LIBRARY=1`` was asked
    for, and only one of a machine's processes speaks.
    """
    global _told
    # the library's operators are called when it is loaded: not while somebody records those
    if _told or not is_wanted("auto") or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return
    _told = True
    if library.unavailable() is not None and _can_be_helped() and _speaks():
        warnings.warn(f"clipfast: {words()}", FallbackWarning, stacklevel=_level_of_caller())


def words() -> str:
    """Return why the op library cannot be used, what that costs, and the remedy where there is one: one line."""
    reason = f"{library.unavailable()}"
    built = library.path().exists()
    root = installation.clone()
    if not built and not library.record() and root is not None:
        reason = f"the op library was not built: clipfast runs from its sources in {root}"
    said = f"{reason}: {_COST}"
    if not _can_be_helped() or (built and "clipfast again" not in reason):
        # what is to be done is in the reason, if anything is
        return said
    said += f". To {'mend' if built else 'build'} it, {_first_step(library.record().get('remedy'))}"
    other = installation.other_built() if root is not None else None
    return f"{said}; or start Python in another folder, where it finds the clipfast in {other}" if other else said


def words_of_cuda(refusal: str) -> str:
    """Return why the op library does not serve a card, with the remedy where it was built without CUDA.

    Args:
        refusal: What :func:`~clipfast.ops.library.card_support` said.
    """
    record = library.record()
    if refusal != library.WITHOUT_CUDA or not record.get("cuda_reason"):
        return refusal
    first = _first_step(record.get("cuda_remedy"))
    return f"the op library was built without CUDA: {record['cuda_reason']}. To build it with CUDA, {first}"


def _first_step(remedy: str | None) -> str:
    command = installation.command()
    return f"{remedy}, then run {command}" if remedy else f"run {command}"


def _can_be_helped() -> bool:
    return sys.platform == "linux" and not library.is_switched_off()


def _speaks() -> bool:
    """Return whether no other process says it: a rank of the same machine, or what started this worker."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return False
    ranks = torch.distributed
    if "LOCAL_RANK" not in os.environ and ranks.is_available() and ranks.is_initialized() and ranks.get_rank():
        return False
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return False
    # a process that is spawned runs the script of its parent up to the guard of the main module
    return not getattr(multiprocessing.current_process(), "_inheriting", False)


def _level_of_caller() -> int:
    """Return the ``stacklevel`` for who called clipfast, counted from the function that calls this one."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("clipfast", "torch"):
        level, frame = level + 1, frame.f_back
    return level
