"""Every op and its implementations, and the choices that are kept between them; see :mod:`clipfast.ops.dispatch`."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from clipfast.ops import call_classes, keys
from clipfast.ops.switches import Switches


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    ``refusal`` gets the call's arguments and returns why this implementation cannot serve them, or None. The plan names
    no implementation that is not ``planned``: it serves where it is asked for, or nothing else can.
    """

    backend: str
    description: str
    run: Callable[..., Any]
    refusal: Callable[..., str | None] = lambda *args, **kwargs: None
    planned: bool = True


def _no_signature(*args: Any) -> tuple[Any, ...]:
    raise LookupError("choices of this op are not kept")


class Op:
    """An op; ``kept`` holds its choices for every setting of the switches, ``current`` those for the last one."""

    def __init__(
        self,
        prepare: Callable[..., tuple[Any, ...]],
        implementations: tuple[Implementation, ...],
        key: Callable[..., call_classes.Key],
        signature: Callable[..., tuple[Any, ...]],
        bind: Callable[..., Callable[..., Any]] | None,
    ) -> None:
        self.prepare, self.implementations, self.key = prepare, implementations, key
        self.signature, self.bind = signature, bind
        # a backend may have several: the first that can serve a call does
        self.planned = tuple(dict.fromkeys(i.backend for i in implementations if i.planned))
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Drop all choices. Those that are being made go to dictionaries that nobody reads any more."""
        self.kept: dict[tuple[Any, ...], dict[Any, Any]] = {}
        self.current: tuple[Switches | None, dict[Any, Any]] = None, {}

    def with_implementations(self, *implementations: Implementation) -> Op:
        """Return the op with others in the place of its implementations."""
        return Op(self.prepare, implementations, self.key, self.signature, self.bind)


# asked before a choice is kept: whether something passing, such as a capture, decides on a device now
momentary: list[Callable[[torch.device], bool]] = []

# by the ops' names
entries: dict[str, Op] = {}
_all: weakref.WeakSet[Op] = weakref.WeakSet()


def forget_choices() -> None:
    """Choose anew for every call: something else than its arguments has changed that a choice depends on."""
    for op in list(_all):
        op.forget()


def register(
    op: str,
    prepare: Callable[..., tuple[Any, ...]],
    *implementations: Implementation,
    key: Callable[..., call_classes.Key] | None = None,
    signature: Callable[..., tuple[Any, ...]] = _no_signature,
    bind: Callable[..., Callable[..., Any]] | None = None,
) -> None:
    """Register an op.

    Args:
        op: Its name.
        prepare: Checks the arguments of the public function and returns those of the implementations.
        *implementations: In the order in which they are tried where the plan's own cannot serve; the last serves every
            call.
        key: Gets the implementations' arguments and returns what of them decides: by default the first tensor's dtype
            and width, and whether gradients are recorded or autocast is on.
        signature: Gets the arguments of :func:`call` and returns, at little cost, all of them that ``prepare``, ``key``
            and the implementations' refusals look at, hashable; it need not check anything. By default nothing is kept.
        bind: Gets an implementation, the arguments that ``prepare`` made for it and those of :func:`call`; returns a
            function of such arguments with this signature. It checks what a signature does not hold, such as values.
            By default the implementation takes the arguments of :func:`call` as they are.
    """
    entries[op] = Op(prepare, implementations, key or functools.partial(_key, op), signature, bind)


def _key(op: str, *request: Any) -> call_classes.Key:
    first = next(argument for argument in request if isinstance(argument, torch.Tensor))
    width = call_classes.bound(first.shape[-1], call_classes.WIDTHS)
    # no size: the ranks of a loss have to choose alike, whatever their shares of the batch are
    return call_classes.Key(op, (keys.name_of(first.dtype),), **keys.modes(first), width=width)


def operations() -> list[str]:
    """Return the names of all ops."""
    return sorted(entries)


def backends(op: str) -> list[str]:
    """Return the backends that an op has implementations of, fastest first as they are registered."""
    return list(dict.fromkeys(c.backend for c in entries[op].implementations))


def plannable(op: str) -> tuple[str, ...]:
    """Return the backends of ``op`` that a tuned file or a measurement may name."""
    return entries[op].planned
