"""Kernels are checked on a card before they are trusted: against float64, and against themselves.

What was compiled, tested and reckoned elsewhere may still be wrong on a card, with a driver or in a version of Triton
that nobody has tried. Before a configuration of a kernel first serves a call, a :class:`Probe` of it runs on this card:
its results have to lie within the bound of docs/numerics.md, in every copy of the probe's inputs, and launched again
and again on a grid that fills the card they have to be bitwise the same. The kernels are deterministic, so a difference
is a race. What fails is not used.

A check takes milliseconds beside the compilation that it brings forward. What passed is kept beside Triton's cache for
the same versions, and is not checked again. Nothing is checked, compiled or loaded while a CUDA graph is captured or
``torch.compile`` traces: what is not ready by then is PyTorch's.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast.files import write_atomically
from clipfast.ops import fallback, identity, numerics, plan
from clipfast.ops.registry import forget_choices
from clipfast.ops.switches import environment_switch

# launches of a probe, all of which have to give the same bits
LAUNCHES = 8
# programs of a probe's grid for each multiprocessor: as many as may be resident at a time, four times over
PROGRAMS = 4 * 4


@dataclass(frozen=True)
class Probe:
    """A trial of one configuration of a kernel.

    Attributes:
        launch: Runs the kernel and returns its results. Its inputs are ``copies`` of the same small ones.
        copies: How often the inputs lie behind each other, in the first dimension of ``rows`` of the results.
        rows: How many of the results have rows of their own for every copy; the others are sums over copies. None: all.
        expected: Returns the results by plain PyTorch: in the kernel's dtypes, or in float64. Those with rows stand for
            one copy, sums for all.
        scales: The natural scales of the results; max|oracle| by default.
    """

    launch: Callable[[], Sequence[Tensor]]
    copies: int
    rows: int | None
    expected: Callable[[bool], Sequence[Tensor]]
    scales: tuple[float, ...] | None = None


class Trial(NamedTuple):
    """A configuration of a kernel: what tells it from others, and how to check it.

    ``name`` is part of a message and, with ``key``, of the record on disk. ``probe`` gets the number of programs that
    its grid should have.
    """

    name: str
    key: Hashable
    probe: Callable[[int], Probe]


# by device and trial: None for what passed, else why it is not used
_verdicts: dict[tuple[torch.device, str, Hashable], str | None] = {}
_lock = threading.RLock()
_UNKNOWN = object()


_enabled = environment_switch("CLIPFAST_CHECK")


def is_required(device: torch.device) -> bool:
    """Return whether kernels have to pass their checks on a device: on every card, unless CLIPFAST_CHECK=0 is set."""
    return _enabled and device.type == "cuda"


def is_possible() -> bool:
    """Return whether a check may run now: not where tensors are traced, faked or watched, and hold no values.

    What is called there is an operator, which is checked before it first runs.
    """
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def refusal(op: str, device: torch.device, trials: Iterable[Trial]) -> str | None:
    """Return why the kernels of a call are not trusted on a device, or None; the first time, this checks them.

    Args:
        op: The op that the call is one of.
        device: A card.
        trials: The configurations that serve the call.

    Raises:
        Exception: A check left the device in a state that nothing can use (:func:`clipfast.ops.fallback.is_final`).
    """
    for trial in trials:
        verdict = _verdicts.get((device, trial.name, trial.key), _UNKNOWN)
        if verdict is _UNKNOWN:
            verdict = _decide(op, device, trial)
        if verdict is None:
            verdict = plan.refusal(trial.name)
        if verdict is not None:
            return verdict
    return None


def serve(
    op: str,
    device: torch.device,
    trials: Callable[..., Iterable[Trial]],
    kernel: Callable[..., Any],
    plain: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """Return what ``kernel`` gives for the arguments; what ``plain`` does where the kernel is not trusted, or fails.

    Args:
        op: The op that the kernel belongs to.
        device: Where it runs.
        trials: Gets the arguments and returns the configurations that serve them.
        kernel, plain, *arguments: As for :func:`clipfast.ops.fallback.serve`, which says what passes through.
    """
    if is_required(device) and refusal(op, device, trials(*arguments)) is not None:
        return plain(*arguments)
    return fallback.serve(op, device, kernel, plain, *arguments)


def checked(device: torch.device) -> list[str]:
    """Return the names of what passed on a device, in this process or before."""
    return sorted({name for (where, name, _), verdict in _verdicts.items() if where == device and verdict is None})


def refused(device: torch.device) -> dict[str, str]:
    """Return the names of what did not pass on a device, and why."""
    found = ((name, verdict) for (where, name, _), verdict in _verdicts.items() if where == device)
    return {name: verdict for name, verdict in found if verdict is not None}


def all_refused() -> dict[str, str]:
    """Return what :func:`refused` does, for all devices."""
    return {name: verdict for (_, name, _), verdict in _verdicts.items() if verdict is not None}


# the other ranks are told
plan.report("refused", all_refused)


def forget() -> None:
    """Check everything anew, whatever the record on disk says of this process's versions."""
    with _lock:
        _verdicts.clear()
        _kept.cache_clear()
    forget_choices()


def _decide(op: str, device: torch.device, trial: Trial) -> str | None:
    if fallback.captures(device):
        reason = f"{trial.name}: not checked on this card before a CUDA graph was captured; call clipfast.warm_up first"
        fallback.announce(op, device, reason)
        return reason
    key = (device, trial.name, trial.key)
    with _lock:
        # another thread may have been faster
        if key in _verdicts:
            return _verdicts[key]
        known = _record(trial)
        if known in _kept(device):
            verdict = None
        else:
            verdict = examine(trial, device)
            if verdict is None:
                _keep(device, known)
            else:
                fallback.announce(op, device, verdict)
        _verdicts[key] = verdict
    if verdict is not None:
        forget_choices()
    return verdict


def examine(trial: Trial, device: torch.device) -> str | None:
    """Check a configuration on a device; return why it must not be used, or None.

    Raises:
        Exception: The device's state is lost.
    """
    with _undisturbed(device):
        try:
            wrong = _wrong(trial.probe(PROGRAMS * multiprocessors(device)))
        except torch.OutOfMemoryError:
            wrong = "there was no memory for its check"
        except Exception as error:
            if fallback.is_final(error):
                raise
            wrong = fallback.in_words(error)
    return None if wrong is None else f"{trial.name}: {wrong}"


def _wrong(probe: Probe) -> str | None:
    """Return what is wrong with a kernel, or None."""
    first = [t.detach() for t in probe.launch()]
    for launch in range(1, LAUNCHES):
        if not all(same_bits(a, b) for a, b in zip(first, probe.launch(), strict=True)):
            return f"launch {launch + 1} on the same data gave other bits than launch 1: a race"
    found = []
    for i, result in enumerate(first):
        if probe.rows is not None and i >= probe.rows:
            found.append(result)
            continue
        copies = result.unflatten(0, (probe.copies, -1))
        found.append(copies[0])
        if not same_bits(copies, copies[:1].expand_as(copies)):
            return "the same rows gave other bits in another place of the grid"
    error, allowed = numerics.worst(found, probe.expected(False), probe.expected(True), probe.scales)
    if error <= allowed:
        return None
    return f"it computes wrong results: the error is {error:.2e}, at most {allowed:.2e} is allowed"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are equal, NaN beside NaN included."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool((a.view(bits) == b.view(bits)).all())


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Let a check compute in the midst of anything: its waits are no faults, and it keeps nothing for gradients."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        try:
            with torch.cuda.device(device):
                yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the multiprocessors of a card; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# ----------------------------------------------------------------------------------------------------------------------
# what passed, kept on disk


def _record(trial: Trial) -> str:
    return f"{trial.name} {trial.key!r}"


def record_path(device: torch.device) -> Path:
    """Return the file that keeps what passed on a device, with these versions of everything."""
    name = hashlib.sha256(json.dumps(_versions(device), sort_keys=True).encode()).hexdigest()[:16]
    return _cache_folder() / f"clipfast-checked-{name}.json"


def _cache_folder() -> Path:
    try:
        from triton import knobs

        return Path(knobs.cache.dir)
    except Exception:
        return Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")


@functools.cache
def _versions(device: torch.device) -> dict[str, str]:
    # what computes is the same in Triton's interpreter, on the CPU
    return identity.of_device(device) | identity.of_software("cuda")


@functools.cache
def _kept(device: torch.device) -> set[str]:
    try:
        return set(json.loads(record_path(device).read_text(encoding="utf-8"))["passed"])
    except Exception:
        # none yet, unreadable, or half-written by somebody else: everything is checked again
        return set()


def _keep(device: torch.device, record: str) -> None:
    kept = _kept(device)
    kept.add(record)
    path = record_path(device)
    with suppress(OSError):
        # what other processes found meanwhile stays
        with suppress(OSError, ValueError, KeyError, TypeError):
            kept.update(json.loads(path.read_text(encoding="utf-8"))["passed"])
        content = {"versions": _versions(device), "passed": sorted(kept)}
        write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))
