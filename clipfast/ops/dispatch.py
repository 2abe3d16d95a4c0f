"""Which implementation serves a call: the choice, how to force it, and how to ask for it.

Every op registers its implementations here. ``auto`` takes the one that the process' plan names
(:mod:`clipfast.ops.plan`: a tuned file, a shipped measurement, or the rule), or where that cannot serve the call the
first in order that can. A backend that was asked for stands above the plan; where it cannot serve a call ``auto`` does,
with one warning that names the reason.

A choice is kept, by what of the arguments it depends on (an op's ``signature``), until something else that it depends
on changes: a switch below, the plan, a kernel that failed or did not pass its check. Nothing is kept of what is traced,
exported or watched by a dispatch mode, nor while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from clipfast.ops import plan, rules

# what runs wherever PyTorch does
_PLAIN = ("torch", "reference")
BACKENDS = ("auto", "reference", "torch", "native", "triton")
# kept choices of an op; shapes that go on changing do not fill the memory
_MOST = 1024

_is_compiling = torch.compiler.is_compiling
# half as long; other compilers and exports have a dispatch mode
_is_dynamo = torch.compiler.is_dynamo_compiling
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack


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


class _Op:
    """An op; ``kept`` holds its choices for every setting of the switches, ``current`` those for the last one."""

    def __init__(
        self,
        prepare: Callable[..., tuple[Any, ...]],
        implementations: tuple[Implementation, ...],
        key: Callable[..., rules.Key],
        signature: Callable[..., tuple[Any, ...]],
        bind: Callable[..., Callable[..., Any]] | None,
    ) -> None:
        self.prepare, self.implementations, self.key = prepare, implementations, key
        self.signature, self.bind = signature, bind
        self.planned = tuple(i.backend for i in implementations if i.planned)
        self.forget()
        _all.add(self)

    def forget(self) -> None:
        """Drop all choices. Those that are being made go to dictionaries that nobody reads any more."""
        self.kept: dict[tuple[Any, ...], dict[Any, Any]] = {}
        self.current: tuple[_Switches | None, dict[Any, Any]] = None, {}

    def with_implementations(self, *implementations: Implementation) -> _Op:
        """Return the op with others in the place of its implementations."""
        return _Op(self.prepare, implementations, self.key, self.signature, self.bind)


_ops: dict[str, _Op] = {}
_all: weakref.WeakSet[_Op] = weakref.WeakSet()
_announced: set[tuple[str, str, str]] = set()
_told: set[tuple[str, str]] = set()


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}")
    return name


class _Switches(NamedTuple):
    """What is forced: a backend, results that are independent of the batch, choices as for a large one."""

    wanted: str
    deterministic: bool = False
    large: bool = False


# One for the process, not for a thread or a context: the backward pass recomputes checkpointed blocks in threads of
# its own, and those must choose as the forward pass did. Every setting is an object of its own: what was chosen while
# it changed is not kept.
_switches = _Switches(_checked(os.environ.get("CLIPFAST_BACKEND", "auto"), "CLIPFAST_BACKEND"))


def forget_choices() -> None:
    """Choose anew for every call: something else than its arguments has changed that a choice depends on."""
    for op in list(_all):
        op.forget()


plan.on_change(forget_choices)


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
    global _switches
    previous = _switches.wanted
    _switches = _Switches(_checked(name, "backend(name)"), *_switches[1:])
    try:
        yield
    finally:
        _switches = _Switches(previous, *_switches[1:])


def is_wanted(name: str) -> bool:
    """Return whether a backend was asked for by name."""
    return _switches.wanted == name


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
    global _switches
    previous = _switches.deterministic
    _switches = _switches._replace(deterministic=bool(enabled))
    try:
        yield
    finally:
        _switches = _switches._replace(deterministic=previous)


@contextmanager
def as_large_calls(enabled: bool = True) -> Iterator[None]:
    """Choose as for large calls, whatever their size: for who gets ready on a few samples what many will need."""
    global _switches
    previous = _switches.large
    _switches = _switches._replace(large=enabled)
    try:
        yield
    finally:
        _switches = _switches._replace(large=previous)


def are_calls_large() -> bool:
    """Return whether every call counts as a large one: so that results do not depend on the batch, or to get ready."""
    return _switches.large or _switches.deterministic


def is_deterministic() -> bool:
    """Return whether results may not depend on the batch."""
    return _switches.deterministic


def register(
    op: str,
    prepare: Callable[..., tuple[Any, ...]],
    *implementations: Implementation,
    key: Callable[..., rules.Key] | None = None,
    signature: Callable[..., tuple[Any, ...]] = _no_signature,
    bind: Callable[..., Callable[..., Any]] | None = None,
) -> None:
    """Register an op.

    Args:
        op: Its name.
        prepare: Checks the arguments of the public function and returns those of the implementations.
        *implementations: In the order in which they are tried where the plan's own cannot serve; the last serves every
            call.
        key: Gets the implementations' arguments and returns what of them decides: by default the first tensor's dtype,
            and whether gradients are recorded or autocast is on.
        signature: Gets the arguments of :func:`call` and returns, at little cost, all of them that ``prepare``, ``key``
            and the implementations' refusals look at, hashable; it need not check anything. By default nothing is kept.
        bind: Gets an implementation, the arguments that ``prepare`` made for it and those of :func:`call`; returns a
            function of such arguments with this signature. It checks what a signature does not hold, such as values.
            By default the implementation takes the arguments of :func:`call` as they are.
    """
    _ops[op] = _Op(prepare, implementations, key or functools.partial(_key, op), signature, bind)


def _key(op: str, *request: Any) -> rules.Key:
    first = next(argument for argument in request if isinstance(argument, torch.Tensor))
    autocast = torch.is_autocast_enabled(first.device.type)
    return rules.Key(op, (str(first.dtype).removeprefix("torch."),), torch.is_grad_enabled(), autocast)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments of ``op`` and run the implementation that serves them."""
    entry = _ops[op]
    # the cheapest first: this is all that a call pays for its choice
    if not (_is_dynamo() or _dispatch_modes() or _is_tracing() or kwargs):
        switches, choices = entry.current
        if switches is not _switches:
            choices = _choices(entry)[1]
        try:
            run = choices[entry.signature(*args)]
        except Exception:
            # not known yet, or wrong, which the checks say better
            run = None
        if run is not None:
            return run(*args)
    return _first(op, entry, args, kwargs)


def _first(op: str, entry: _Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check arguments and run what serves them, which is kept for others like them."""
    watched = _is_watched()
    switches, choices = (None, {}) if watched else _choices(entry)
    request = entry.prepare(*args, **kwargs)
    choice = _choose(op, request)
    # not where a backend is not to be had: that is announced
    if not watched and not kwargs and switches.wanted in ("auto", choice.backend):
        with suppress(Exception):
            signature = entry.signature(*args)
            run = choice.run if entry.bind is None else entry.bind(choice.run, request, *args)
            _keep(switches, choices, signature, run, request)
    return choice.run(*request)


def remembered(op: str, signature: tuple[Any, ...]) -> Any:
    """Return what :func:`remember` was given, or None where it has to be found out: as choices of ``op`` are kept."""
    return None if _is_watched() else _choices(_ops[op])[1].get(signature)


def remember(op: str, signature: tuple[Any, ...], value: Any, *tensors: torch.Tensor) -> Any:
    """Keep and return what follows from choices of ``op`` for calls with these tensors.

    Args:
        op: The op.
        signature: All else that it depends on.
        value: What to keep.
        *tensors: Of the call.
    """
    if not _is_watched():
        _keep(*_choices(_ops[op]), signature, value, tensors)
    return value


def _is_watched() -> bool:
    """Return whether a call is traced, exported or seen by a mode: nothing is kept then."""
    return _is_compiling() or _dispatch_modes() > 0 or leaves_clipfast()


def _choices(entry: _Op) -> tuple[_Switches, dict[Any, Any]]:
    """Return the switches and the choices that are kept for them."""
    switches, kept = _switches, entry.kept
    entry.current = current = switches, kept.setdefault(tuple(switches), {})
    return current


def _keep(
    switches: _Switches, choices: dict[Any, Any], signature: tuple[Any, ...], value: Any, request: tuple[Any, ...]
) -> None:
    """Keep what was chosen, unless it depends on something of the moment or the switches have changed meanwhile."""
    devices = {x.device for x in request if isinstance(x, torch.Tensor)}
    if switches is _switches and not any(ask(device) for ask in momentary for device in devices):
        if len(choices) >= _MOST:
            choices.clear()
        choices[signature] = value


# asked before a choice is kept: whether something passing, such as a capture, decides on a device now
momentary: list[Callable[[torch.device], bool]] = []


def chosen(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the backend that would serve a call of ``op``."""
    return _choose(op, _ops[op].prepare(*args, **kwargs)).backend


def serving(op: str, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the implementation that would serve a call of ``op``, and the arguments that it would get."""
    request = _ops[op].prepare(*args, **kwargs)
    return _choose(op, request).run, request


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


def plannable(op: str) -> tuple[str, ...]:
    """Return the backends of ``op`` that a tuned file or a measurement may name."""
    return _ops[op].planned


def key_of(op: str, *args: Any, **kwargs: Any) -> rules.Key:
    """Return what decides a call of ``op``: its class, as gradients, autocast and ``deterministic()`` are set now."""
    return _ops[op].key(*_ops[op].prepare(*args, **kwargs))


def shape_class(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the name of a call's class in tuned files and in the table of measurements."""
    return key_of(op, *args, **kwargs).name


def _choose(op: str, request: tuple[Any, ...]) -> Implementation:
    if leaves_clipfast():
        # before the sizes are looked at: the number of rows may be none yet
        return next(c for c in _ops[op].implementations if c.backend in _PLAIN and c.refusal(*request) is None)
    candidates, wanted = _ops[op].implementations, _switches.wanted
    if wanted != "auto":
        reason = f"it has no {wanted} implementation"
        for candidate in candidates:
            if candidate.backend == wanted:
                refusal = candidate.refusal(*request)
                if refusal is None:
                    return candidate
                reason = refusal
        _announce(op, reason)
    planned = _plan(op, request)[0]
    for candidate in candidates:
        if candidate.backend == planned and candidate.refusal(*request) is None:
            return candidate
    return next(c for c in candidates if c.refusal(*request) is None)


def leaves_clipfast() -> bool:
    """Return whether what runs now is being recorded for somewhere without clipfast: an export, or a JIT trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _plan(op: str, request: tuple[Any, ...]) -> tuple[str, str, str]:
    """Return what the plan decides for a call (:class:`clipfast.ops.plan.Decision`)."""
    device = next(argument.device for argument in request if isinstance(argument, torch.Tensor))
    return _decision(op, tuple(_ops[op].key(*request)), device.type, device.index, plan.generation)


@constant_when_compiled
def _decision(
    op: str, key: tuple[Any, ...], device_type: str, index: int | None, generation: str
) -> tuple[str, str, str]:
    # compiled code is guarded by the generation that it was decided in
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    return tuple(plan.decision(op, rules.Key(*key), device, _ops[op].planned))


def mark_told(op: str, reason: str) -> None:
    """Spare the user a second warning of why a backend that was asked for does not serve an op."""
    _told.add((op, reason))


def _announce(op: str, reason: str) -> None:
    wanted = _switches.wanted
    key = (op, wanted, reason)
    if key not in _announced and (op, reason) not in _told and not torch.compiler.is_compiling():
        _announced.add(key)
        warnings.warn(
            f"clipfast: {op} does not use the {wanted} backend that was asked for: {reason}",
            FallbackWarning,
            stacklevel=6,
        )


def announce_slower(what: str, how: str) -> None:
    """Warn, once a process, that ``auto`` has to do with a slower implementation."""
    key = (what, "auto", how)
    if is_wanted("auto") and key not in _announced and not torch.compiler.is_compiling():
        _announced.add(key)
        warnings.warn(f"clipfast: {what} {how}", FallbackWarning, stacklevel=5)


_SPOKE = {"tuned": "the tuned file", "measured": "the measurement of this card", "rule": "the rule"}


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Say which implementation serves a call of an op, and why.

    Args:
        op: An op's name, such as ``"attention"``.
        *args, **kwargs: The arguments of the call, as for ``clipfast.ops.<op>``.

    Returns:
        One line for the implementation that serves the call, one for who decided so (a backend that was asked for, the
        tuned file, a shipped measurement of this card, or the rule), then one for each of the others, with its reason.

    Raises:
        ValueError: There is no op of that name.
    """
    if op not in _ops:
        raise ValueError(f"explain(op): got {op!r}, expected one of {', '.join(map(repr, sorted(_ops)))}")
    request = _ops[op].prepare(*args, **kwargs)
    serving = _choose(op, request)
    lines = [f"{op}: {serving.backend} ({serving.description})"]
    if is_wanted(serving.backend):
        why = f"the {serving.backend} backend was asked for"
        lines.append(f"  because {why}")
    else:
        backend, authority, sentence = _plan(op, request)
        why = f"{_SPOKE[authority]} takes {serving.backend}"
        if backend != serving.backend:
            why = f"{_SPOKE[authority]} takes {backend}, and {serving.backend} where that cannot serve"
        lines.append(f"  because {why}: {sentence}")
    for candidate in _ops[op].implementations:
        if candidate is not serving:
            lines.append(f"  not {candidate.backend} ({candidate.description}): {candidate.refusal(*request) or why}")
    return "\n".join(lines)
