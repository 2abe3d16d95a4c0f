"""Which implementation serves a call: the choice, how to force it, and how to ask for it.

Every op registers its implementations here, fastest first. ``auto`` takes the first that can serve the call, and
one that must be measured only where :mod:`clipfast.ops.measured` says that it is the fastest on this card: nothing is
tuned or timed at run time, and a card that nobody measured gets PyTorch's operators.
A backend that was asked for but cannot serve a call is replaced by what ``auto`` would take, with one warning
that names the reason.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from clipfast.ops import measured

# what runs wherever PyTorch does
_PLAIN = ("torch", "reference")
BACKENDS = ("auto", "reference", "torch", "native", "triton")


def constant_when_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``torch.compile`` call a function while it compiles, and keep the result.

    ``torch.compiler.assume_constant_result`` sets the same attribute, but imports the compiler, and that Triton.
    """
    function._dynamo_marked_constant = True
    return function


def environment_switch(name: str) -> bool:
    """Return whether an environment variable leaves something on: ``1``, which is its default, or ``0``.

    Raises:
        ValueError: It is set to something else.
    """
    value = os.environ.get(name, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{name}: got {value!r}, expected '0' or '1'")
    return value == "1"


class FallbackWarning(UserWarning):
    """The backend that was asked for cannot serve a call; another one does, with the same results."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``refusal`` gets the call's arguments and returns why this implementation cannot serve them, or None.
    ``auto`` takes one that is ``measured`` only where the table of measurements names it.
    """

    backend: str
    description: str
    run: Callable[..., Any]
    refusal: Callable[..., str | None] = lambda *args, **kwargs: None
    measured: bool = False


@dataclass(frozen=True)
class _Op:
    prepare: Callable[..., tuple[Any, ...]]
    implementations: tuple[Implementation, ...]
    shape_class: Callable[..., str]


_ops: dict[str, _Op] = {}
_announced: set[tuple[str, str, str]] = set()
_told: set[tuple[str, str]] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return name


# One for the process, not for a thread or a context: the backward pass recomputes checkpointed blocks in threads of
# its own, and those must choose as the forward pass did.
_wanted = _checked(os.environ.get("CLIPFAST_BACKEND", "auto"), "CLIPFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the implementations of one backend inside a ``with`` block, for the whole process.

    Args:
        name: ``"auto"`` (the fastest that serves the call), ``"reference"`` (plain PyTorch, the specification),
            ``"torch"`` (PyTorch's fused operators), ``"native"`` (the compiled library) or ``"triton"``.

    The environment variable ``CLIPFAST_BACKEND`` sets the same for a process. A call that the backend cannot
    serve falls back to ``auto`` and is announced once by a :class:`FallbackWarning`. Run the backward pass inside
    the block too where activations are checkpointed: it calls the ops again.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _wanted
    previous, _wanted = _wanted, _checked(name, "backend(name)")
    try:
        yield
    finally:
        _wanted = previous


def is_wanted(name: str) -> bool:
    """Return whether a backend was asked for by name."""
    return _wanted == name


_deterministic = False


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    """Make embeddings independent of their batch, bitwise, inside a ``with`` block and for the whole process.

    Matrix products add up in an order that depends on how many rows there are, so that an image's features differ in
    their last digits from batch to batch. Inside the block they do not: the op library's own CPU products have one
    order of sums for every row, and where those cannot serve (another device or dtype, with gradients, without the
    library), towers take one image or caption at a time, which is slow. docs/inference.md says what either costs.

    Args:
        enabled: Whether to; a block with False inside one with True goes back to any order.
    """
    global _deterministic
    previous, _deterministic = _deterministic, bool(enabled)
    try:
        yield
    finally:
        _deterministic = previous


def is_deterministic() -> bool:
    """Return whether results may not depend on the batch."""
    return _deterministic


def register(
    op: str,
    prepare: Callable[..., tuple[Any, ...]],
    *implementations: Implementation,
    shape_class: Callable[..., str] = lambda *args, **kwargs: "every shape",
) -> None:
    """Register an op.

    Args:
        op: Its name.
        prepare: Checks the arguments of the public function and returns those of the implementations.
        *implementations: Fastest first; the last serves every call.
        shape_class: Gets the implementations' arguments and returns the key under which the table of measurements
            names the fastest one: dtype and sizes, coarse enough that a few measurements decide every call.
    """
    _ops[op] = _Op(prepare, implementations, shape_class)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments of ``op`` and run the implementation that serves them."""
    request = _ops[op].prepare(*args, **kwargs)
    return _choose(op, request).run(*request)


def chosen(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the backend that would serve a call of ``op``."""
    return _choose(op, _ops[op].prepare(*args, **kwargs)).backend


def operations() -> list[str]:
    """Return the names of all ops."""
    return sorted(_ops)


def backends(op: str) -> list[str]:
    """Return the backends that an op has implementations of, fastest first as they are registered."""
    return [c.backend for c in _ops[op].implementations]


def able(op: str, *args: Any, **kwargs: Any) -> list[str]:
    """Return the backends that can serve a call of ``op``, whether or not ``auto`` would take them."""
    request = _ops[op].prepare(*args, **kwargs)
    return [c.backend for c in _ops[op].implementations if c.refusal(*request) is None]


def shape_class(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the key of a call of ``op`` in the table of measurements."""
    return _ops[op].shape_class(*_ops[op].prepare(*args, **kwargs))


def _choose(op: str, request: tuple[Any, ...]) -> Implementation:
    if leaves_clipfast():
        # before the sizes are looked at: the number of rows may be none yet
        return next(c for c in _ops[op].implementations if c.backend in _PLAIN and c.refusal(*request) is None)
    return _fastest(op, request)


def leaves_clipfast() -> bool:
    """Return whether what runs now is being recorded for somewhere without clipfast: an export, or a JIT trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _fastest(op: str, request: tuple[Any, ...]) -> Implementation:
    candidates = _ops[op].implementations
    if _wanted != "auto":
        reason = f"it has no {_wanted} implementation"
        for candidate in candidates:
            if candidate.backend == _wanted:
                refusal = candidate.refusal(*request)
                if refusal is None:
                    return candidate
                reason = refusal
        _announce(op, reason)
    # a look into the table costs less than a refusal's checks
    return next(c for c in candidates if _slower(op, c, request) is None and c.refusal(*request) is None)


def _slower(op: str, candidate: Implementation, request: tuple[Any, ...]) -> str | None:
    """Return why ``auto`` does not take a candidate that could serve the call, or None."""
    if not candidate.measured:
        return None
    device = next(argument.device for argument in request if isinstance(argument, torch.Tensor))
    fastest, reason = _measurement(op, _ops[op].shape_class(*request), device.type, device.index)
    return None if fastest == candidate.backend else reason


@constant_when_compiled
def _measurement(op: str, key: str, device_type: str, index: int | None) -> tuple[str | None, str]:
    """Return the backend that was fastest on a device, or None, and the sentence that says so."""
    card = torch.cuda.get_device_name(index) if device_type == "cuda" else device_type
    if card not in measured.CARDS:
        return None, f"no measurement for {card}"
    fastest = measured.CARDS[card].fastest.get(op, {}).get(key)
    if fastest is None:
        return None, f"no measurement for {card} of {key}"
    return fastest, f"{fastest} was faster on {card} for {key}"


def mark_told(op: str, reason: str) -> None:
    """Spare the user a second warning of why a backend that was asked for does not serve an op."""
    _told.add((op, reason))


def _announce(op: str, reason: str) -> None:
    key = (op, _wanted, reason)
    if key not in _announced and (op, reason) not in _told and not torch.compiler.is_compiling():
        _announced.add(key)
        warnings.warn(
            f"clipfast: {op} does not use the {_wanted} backend that was asked for: {reason}",
            FallbackWarning,
            stacklevel=5,
        )


def announce_slower(what: str, how: str) -> None:
    """Warn, once a process, that ``auto`` has to do with a slower implementation."""
    key = (what, _wanted, how)
    if _wanted == "auto" and key not in _announced and not torch.compiler.is_compiling():
        _announced.add(key)
        warnings.warn(f"clipfast: {what} {how}", FallbackWarning, stacklevel=5)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Say which implementation serves a call of an op, and why.

    Args:
        op: An op's name, such as ``"attention"``.
        *args, **kwargs: The arguments of the call, as for ``clipfast.ops.<op>``.

    Returns:
        One line for the implementation that serves the call, then one for each that does not, with its reason.

    Raises:
        ValueError: There is no op of that name.
    """
    if op not in _ops:
        raise ValueError(f"explain(op): got {op!r}, expected one of {', '.join(map(repr, sorted(_ops)))}")
    request = _ops[op].prepare(*args, **kwargs)
    serving = _choose(op, request)
    lines = [f"{op}: {serving.backend} ({serving.description})"]
    for candidate in _ops[op].implementations:
        if candidate is not serving:
            refusal = candidate.refusal(*request)
            if refusal is None and serving.backend == _wanted:
                refusal = f"the {_wanted} backend was asked for"
            refusal = refusal or _slower(op, candidate, request) or "a faster one serves the call"
            lines.append(f"  not {candidate.backend} ({candidate.description}): {refusal}")
    return "\n".join(lines)
