"""What becomes of a call whose kernel fails: PyTorch computes it, one warning says why, and the kernel rests.

A kernel may fail to compile, to load or to launch on a card that nobody has tried: no C compiler for Triton's launcher,
too little shared memory, a driver that is too old. None of that may end a training run. Every operator of a kernel
therefore has a plain PyTorch form with the same arguments and results, and :func:`serve` chooses between them.

A failure is remembered for the op and the device. Calls that keep nothing for a backward pass go straight to PyTorch's
implementation from then on. Others go on through the kernel's autograd function, whose operators compute in PyTorch: a
checkpointed block must save the same tensors when it is computed again, and its first pass may lie before the failure.
"""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from clipfast.ops import plan
from clipfast.ops.announcements import mark_told
from clipfast.ops.registry import forget_choices, momentary
from clipfast.ops.switches import FallbackWarning


class KernelFallbackWarning(FallbackWarning):
    """A kernel failed, or is not used because its check failed; PyTorch computes, with the same results."""


class NotReady(Exception):
    """A kernel would have to be compiled while a CUDA graph is captured, which must not happen."""


# By op and device: why its kernels are not used any more, anywhere or while a CUDA graph is captured.
_failed: dict[tuple[str, torch.device], str] = {}
_not_captured: dict[tuple[str, torch.device], str] = {}
_announced: set[tuple[str, torch.device, str]] = set()
_lock = threading.Lock()

# What no other implementation can mend: memory that has run out, and a device whose state is lost. CUDA says it in
# words (cudaGetErrorString), by name in the runtime (cudaError...) or in the driver (CUDA_ERROR_...).
_FINAL = re.compile(
    r"out of memory|cudaErrorMemoryAllocation|illegal (memory access|address|instruction)|misaligned address"
    r"|device-side assert|unspecified launch failure|launch timed out|hardware stack error|invalid (program counter"
    r"|address space)|uncorrectable|ECC error|device (is lost|unavailable)|fallen off the bus"
    r"|stream is captur|capture.{0,20}(invalid|isolat)|synchronizing CUDA operation"
    r"|cudaError(Illegal\w*|Misaligned\w*|Assert|LaunchFailure|LaunchTimeout|HardwareStack\w*|Invalid(Pc|AddressSpace)"
    r"|ECC\w*|StreamCapture\w*)"
    r"|CUDA_ERROR_(OUT_OF_MEMORY|ILLEGAL_\w+|MISALIGNED\w*|ASSERT|LAUNCH_(FAILED|TIMEOUT)|HARDWARE_\w+"
    r"|INVALID_(PC|ADDRESS_SPACE)|ECC\w*|STREAM_CAPTURE\w*)",
    re.IGNORECASE,
)


def is_final(error: BaseException) -> bool:
    """Return whether an error passes through unchanged: memory has run out, or the device's state is lost."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or not isinstance(error, Exception):
        return True
    return _FINAL.search(str(error)) is not None


def failure(op: str, device: torch.device) -> str | None:
    """Return why an op's kernels are not used on a device any more, or None."""
    reason = plan.failure(op)
    if reason is None and not _failed and not _not_captured:
        return None
    reason = reason or _failed.get((op, device))
    if reason is None and (op, device) in _not_captured and captures(device):
        reason = _not_captured[op, device]
    return reason


def failures() -> dict[tuple[str, torch.device], str]:
    """Return everything that :func:`failure` knows."""
    return _not_captured | _failed


def forget(op: str | None = None) -> None:
    """Try the kernels of an op (all by default) again, and announce anew what fails."""
    with _lock:
        for memory in (_failed, _not_captured):
            for key in [key for key in memory if op in (None, key[0])]:
                del memory[key]
        _announced.difference_update([key for key in _announced if op in (None, key[0])])
    forget_choices()


def forget_captures() -> None:
    """Let graphs that are captured from now on use what has become ready."""
    with _lock:
        _not_captured.clear()
    forget_choices()


def serve(op: str, device: torch.device, kernel: Callable[..., Any], plain: Callable[..., Any], *arguments: Any) -> Any:
    """Return what ``kernel`` gives for the arguments, or ``plain`` where the kernel fails or has failed.

    Args:
        op: The op that the kernel belongs to; a forward and a backward kernel share its fate.
        device: Where it runs.
        kernel: Writes to no argument, so that it may be given up half-way.
        plain: The same in PyTorch.
        *arguments: Of either.

    Raises:
        Exception: What the kernel raised, unchanged: where :func:`is_final`, and where ``plain`` cannot compute the
            call either, since it is the call that is wrong.
    """
    if failure(op, device) is not None:
        return plain(*arguments)
    try:
        return kernel(*arguments)
    except Exception as raised:
        if is_final(raised):
            raise
        error = raised
    try:
        result = plain(*arguments)
    except Exception as other:
        if is_final(other):
            raise
        raise error from None
    remember(op, device, in_words(error), captured_only=isinstance(error, NotReady))
    return result


def remember(op: str, device: torch.device, reason: str, *, captured_only: bool = False) -> None:
    """Give an op's kernels up on a device, with one warning."""
    with _lock:
        (_not_captured if captured_only else _failed).setdefault((op, device), reason)
    forget_choices()
    announce(op, device, reason)


def announce(op: str, device: torch.device, reason: str) -> None:
    """Warn, once for an op, a device and a reason, that PyTorch computes what a kernel should."""
    with _lock:
        if (op, device, reason) in _announced:
            return
        _announced.add((op, device, reason))
    mark_told(op, reason)
    warnings.warn(
        f"clipfast: PyTorch computes {op} on {card(device)} from now on, with the same results, because its kernel "
        f"failed: {reason} (`clipfast doctor` says more)",
        KernelFallbackWarning,
        stacklevel=3,
    )


def in_words(error: BaseException) -> str:
    """Return an error as part of a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def card(device: torch.device) -> str:
    """Return a device's name."""
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else f"the {device.type}"


def captures(device: torch.device) -> bool:
    """Return whether a CUDA graph is captured on a device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


# while something is captured, and as long as captures have a choice of their own, no choice is one for good
momentary.append(lambda device: device.type == "cuda" and (bool(_not_captured) or captures(device)))

# the other ranks are told
plan.report("failed", lambda: {op: reason for (op, _), reason in failures().items()})
