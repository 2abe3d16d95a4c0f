"""What a user forces for the whole process: a backend, and results that are independent of the batch."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

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


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return name


class Switches(NamedTuple):
    """What is forced: a backend, results that are independent of the batch, choices as for a large one."""

    wanted: str
    deterministic: bool = False
    large: bool = False


# One for the process, not for a thread or a context: the backward pass recomputes checkpointed blocks in threads of
# its own, and those must choose as the forward pass did. Every setting is an object of its own: what was chosen while
# it changed is not kept.
current = Switches(_checked(os.environ.get("CLIPFAST_BACKEND", "auto"), "CLIPFAST_BACKEND"))


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the implementations of one backend inside a ``with`` block, for the whole process.

    Args:
        name: ``"auto"`` (what the plan takes), ``"reference"`` (plain PyTorch, the specification), ``"torch"``
            (PyTorch's fused operators), ``"native"`` (the compiled library) or ``"triton"``.

    The environment variable ``CLIPFAST_BACKEND`` sets the same for a process. A call that the backend cannot
    serve falls back to ``auto`` and is announced once by a :class:`FallbackWarning`. Run the backward pass inside
    the block too where activations are checkpointed: it calls the ops again.

    Raises:
        ValueError: ``name`` is none of these.
    """
    global current
    previous = current.wanted
    current = Switches(_checked(name, "backend(name)"), *current[1:])
    try:
        yield
    finally:
        current = Switches(previous, *current[1:])


def is_wanted(name: str) -> bool:
    """Return whether a backend was asked for by name."""
    return current.wanted == name


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
    global current
    previous = current.deterministic
    current = current._replace(deterministic=bool(enabled))
    try:
        yield
    finally:
        current = current._replace(deterministic=previous)


@contextmanager
def as_large_calls(enabled: bool = True) -> Iterator[None]:
    """Choose as for large calls, whatever their size: for who gets ready on a few samples what many will need."""
    global current
    previous = current.large
    current = current._replace(large=enabled)
    try:
        yield
    finally:
        current = current._replace(large=previous)


def are_calls_large() -> bool:
    """Return whether every call counts as a large one: so that results do not depend on the batch, or to get ready."""
    return current.large or current.deterministic


def is_deterministic() -> bool:
    """Return whether results may not depend on the batch."""
    return current.deterministic
