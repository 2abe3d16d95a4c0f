"""Which implementation serves a call: the choice, how to force it, and how to ask for it.

Every op registers its implementations here, fastest first. ``auto`` takes the first that can serve the call.
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

BACKENDS = ("auto", "reference", "torch", "native", "triton")


class FallbackWarning(UserWarning):
    """The backend that was asked for cannot serve a call; another one does, with the same results."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``refusal`` gets the call's arguments and returns why this implementation cannot serve them, or None.
    """

    backend: str
    description: str
    run: Callable[..., Any]
    refusal: Callable[..., str | None] = lambda *args, **kwargs: None


@dataclass(frozen=True)
class _Op:
    prepare: Callable[..., tuple[Any, ...]]
    implementations: tuple[Implementation, ...]


_ops: dict[str, _Op] = {}
_announced: set[tuple[str, str, str]] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return name


_wanted = _checked(os.environ.get("CLIPFAST_BACKEND", "auto"), "CLIPFAST_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the implementations of one backend inside a ``with`` block, for the whole process.

    Args:
        name: ``"auto"`` (the fastest that serves the call), ``"reference"`` (plain PyTorch, the specification),
            ``"torch"`` (PyTorch's fused operators), ``"native"`` (the compiled library) or ``"triton"``.

    The environment variable ``CLIPFAST_BACKEND`` sets the same for a process. A call that the backend cannot
    serve falls back to ``auto`` and is announced once by a :class:`FallbackWarning`.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global _wanted
    previous, _wanted = _wanted, _checked(name, "backend(name)")
    try:
        yield
    finally:
        _wanted = previous


def register(op: str, prepare: Callable[..., tuple[Any, ...]], *implementations: Implementation) -> None:
    """Register an op.

    Args:
        op: Its name.
        prepare: Checks the arguments of the public function and returns those of the implementations.
        *implementations: Fastest first; the last serves every call.
    """
    _ops[op] = _Op(prepare, implementations)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments of ``op`` and run the implementation that serves them."""
    request = _ops[op].prepare(*args, **kwargs)
    return _choose(op, request).run(*request)


def _choose(op: str, request: tuple[Any, ...]) -> Implementation:
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
    return next(c for c in candidates if c.refusal(*request) is None)


def _announce(op: str, reason: str) -> None:
    key = (op, _wanted, reason)
    if key not in _announced and not torch.compiler.is_compiling():
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
    chosen = _choose(op, request)
    lines = [f"{op}: {chosen.backend} ({chosen.description})"]
    for candidate in _ops[op].implementations:
        if candidate is not chosen:
            refusal = candidate.refusal(*request)
            if refusal is None:
                forced = chosen.backend == _wanted
                refusal = f"the {_wanted} backend was asked for" if forced else "a faster one serves the call"
            lines.append(f"  not {candidate.backend} ({candidate.description}): {refusal}")
    return "\n".join(lines)
