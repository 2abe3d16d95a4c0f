"""Which implementation serves a call: the choice, how to force it, and how to ask for it.

Every op registers its implementations (:mod:`clipfast.ops.registry`). ``auto`` takes the one that the process' plan
names (:mod:`clipfast.ops.plan`: a tuned file, a shipped measurement, or the rule), or where that cannot serve the call
the first in order that can. A backend that was asked for stands above the plan; where it cannot serve a call ``auto``
does, with one warning that names the reason.

A choice is kept, by what of the arguments it depends on (an op's ``signature``), until something else that it depends
on changes: a switch below, the plan, a kernel that failed or did not pass its check. Nothing is kept of what is traced,
exported or watched by a dispatch mode, nor while a CUDA graph is captured.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from clipfast.ops import call_classes, plan, switches
from clipfast.ops.announcements import announce_refusal, announce_slower, mark_told
from clipfast.ops.registry import (
    Implementation,
    Op,
    backends,
    entries,
    forget_choices,
    momentary,
    operations,
    plannable,
    register,
)
from clipfast.ops.switches import (
    BACKENDS,
    FallbackWarning,
    Switches,
    are_calls_large,
    as_large_calls,
    backend,
    constant_when_compiled,
    deterministic,
    environment_switch,
    is_deterministic,
    is_wanted,
)

__all__ = [
    "BACKENDS",
    "FallbackWarning",
    "Implementation",
    "able",
    "announce_slower",
    "are_calls_large",
    "as_large_calls",
    "backend",
    "backends",
    "call",
    "chosen",
    "constant_when_compiled",
    "deterministic",
    "environment_switch",
    "explain",
    "explanation",
    "forget_choices",
    "is_deterministic",
    "is_wanted",
    "key_of",
    "leaves_clipfast",
    "mark_told",
    "operations",
    "plannable",
    "register",
    "remembered",
    "serving",
    "shape_class",
]

# what runs wherever PyTorch does
_PLAIN = ("torch", "reference")
# kept choices of an op; shapes that go on changing do not fill the memory
_MOST = 1024

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack

plan.on_change(forget_choices)


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Check the arguments of ``op`` and run the implementation that serves them."""
    entry = entries[op]
    # the cheapest first: this is all that a call pays for its choice
    if not (_is_compiling() or _dispatch_modes() or _is_tracing() or kwargs):
        setting, choices = entry.current
        if setting is not switches.current:
            choices = _choices(entry)[1]
        try:
            run = choices[entry.signature(*args)]
        except Exception:
            # not known yet, or wrong, which the checks say better
            run = None
        if run is not None:
            return run(*args)
    return _first(op, entry, args, kwargs)


def _first(op: str, entry: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Check arguments and run what serves them, which is kept for others like them."""
    watched = _is_watched()
    setting, choices = (None, {}) if watched else _choices(entry)
    request = entry.prepare(*args, **kwargs)
    choice = _choose(op, request)
    # not where a backend is not to be had: that is announced
    if not watched and not kwargs and setting.wanted in ("auto", choice.backend):
        with suppress(Exception):
            signature = entry.signature(*args)
            run = choice.run if entry.bind is None else entry.bind(choice.run, request, *args)
            _keep(setting, choices, signature, run, request)
    return choice.run(*request)


def remembered(op: str, signature: Callable[..., tuple[Any, ...]], find: Callable[..., Any], *args: Any) -> Any:
    """Return ``find(*args)``, which depends on choices of an op and is kept as those are.

    Args:
        op: The op.
        signature: Gets the arguments and returns all of them that count, hashable.
        find: Returns anything but None.
        *args: The arguments.
    """
    if _is_watched():
        return find(*args)
    setting, choices = _choices(entries[op])
    key = signature(*args)
    value = choices.get(key)
    if value is None:
        value = find(*args)
        _keep(setting, choices, key, value, args)
    return value


def _is_watched() -> bool:
    """Return whether a call is traced, exported or seen by a mode: nothing is kept then."""
    return _is_compiling() or _dispatch_modes() > 0 or leaves_clipfast()


def _choices(entry: Op) -> tuple[Switches, dict[Any, Any]]:
    """Return the switches and the choices that are kept for them."""
    while True:
        setting, kept = switches.current, entry.kept
        entry.current = current = setting, kept.setdefault(tuple(setting), {})
        # not what another thread has dropped meanwhile
        if entry.kept is kept:
            return current


def _keep(
    setting: Switches, choices: dict[Any, Any], signature: tuple[Any, ...], value: Any, request: tuple[Any, ...]
) -> None:
    """Keep what was chosen, unless it depends on something of the moment or the switches have changed meanwhile."""
    devices = {x.device for x in request if isinstance(x, torch.Tensor)}
    if setting is switches.current and not any(ask(device) for ask in momentary for device in devices):
        if len(choices) >= _MOST:
            choices.clear()
        choices[signature] = value


def chosen(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the backend that would serve a call of ``op``."""
    return _choose(op, entries[op].prepare(*args, **kwargs)).backend


def serving(op: str, *args: Any, **kwargs: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return the implementation that would serve a call of ``op``, and the arguments that it would get."""
    request = entries[op].prepare(*args, **kwargs)
    return _choose(op, request).run, request


def able(op: str, *args: Any, **kwargs: Any) -> list[str]:
    """Return the backends that can serve a call of ``op``, whether or not ``auto`` would take them."""
    request = entries[op].prepare(*args, **kwargs)
    return list(dict.fromkeys(c.backend for c in entries[op].implementations if c.refusal(*request) is None))


def key_of(op: str, *args: Any, **kwargs: Any) -> call_classes.Key:
    """Return what decides a call of ``op``: its class, as gradients, autocast and ``deterministic()`` are set now."""
    return entries[op].key(*entries[op].prepare(*args, **kwargs))


def shape_class(op: str, *args: Any, **kwargs: Any) -> str:
    """Return the name of a call's class in tuned files and in the table of measurements."""
    return key_of(op, *args, **kwargs).name


def _choose(op: str, request: tuple[Any, ...]) -> Implementation:
    if leaves_clipfast():
        # before the sizes are looked at: the number of rows may be none yet
        return next(c for c in entries[op].implementations if c.backend in _PLAIN and c.refusal(*request) is None)
    candidates, wanted = entries[op].implementations, switches.current.wanted
    if wanted != "auto":
        reason = f"it has no {wanted} implementation"
        for candidate in candidates:
            if candidate.backend == wanted:
                refusal = candidate.refusal(*request)
                if refusal is None:
                    return candidate
                reason = refusal
        announce_refusal(op, reason)
    planned = _plan(op, request)[0]
    for candidate in candidates:
        if candidate.backend == planned and candidate.refusal(*request) is None:
            return candidate
    return next(c for c in candidates if not _is_interpreted(c, request) and c.refusal(*request) is None)


def _is_interpreted(candidate: Implementation, request: tuple[Any, ...]) -> bool:
    """Return whether an implementation would run in Triton's interpreter, which serves who asks for it alone."""
    return candidate.backend == "triton" and any(x.is_cpu for x in request if isinstance(x, torch.Tensor))


def leaves_clipfast() -> bool:
    """Return whether what runs now is being recorded for somewhere without clipfast: an export, or a JIT trace."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def _plan(op: str, request: tuple[Any, ...]) -> tuple[str, str, str, str]:
    """Return what the plan decides for a call (:class:`clipfast.ops.plan.Decision`)."""
    device = next(argument.device for argument in request if isinstance(argument, torch.Tensor))
    return _decision(op, tuple(entries[op].key(*request)), device.type, device.index, plan.generation)


@constant_when_compiled
def _decision(
    op: str, key: tuple[Any, ...], device_type: str, index: int | None, generation: str
) -> tuple[str, str, str, str]:
    # compiled code is guarded by the generation that it was decided in
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    return tuple(plan.decision(op, call_classes.Key(*key), device, entries[op].planned))


_SPOKE = {"tuned": "the tuned file", "measured": "the measurement of this card", "rule": "the rule"}


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Say which implementation serves a call of an op, and why.

    Args:
        op: An op's name, such as ``"attention"``.
        *args, **kwargs: The arguments of the call, as for ``clipfast.ops.<op>``.

    Returns:
        One line for the implementation that serves the call, one for who decided so (a backend that was asked for, the
        tuned file, a shipped measurement of this card, or the rule), one for each of the others with its reason, and
        where the rule decided, one for why nothing measured did.

    Raises:
        ValueError: There is no op of that name.
    """
    if op not in entries:
        raise ValueError(f"explain(op): got {op!r}, expected one of {', '.join(map(repr, sorted(entries)))}")
    lines, advice = explanation(op, *args, **kwargs)
    return "\n".join([*lines, f"  {advice}"] if advice else lines)


def explanation(op: str, *args: Any, **kwargs: Any) -> tuple[list[str], str]:
    """Return the lines of :func:`explain` but for the last, and that, or nothing: it is about the tuned file."""
    request = entries[op].prepare(*args, **kwargs)
    serving = _choose(op, request)
    advice = ""
    lines = [f"{op}: {serving.backend} ({serving.description})"]
    if is_wanted(serving.backend):
        why = f"the {serving.backend} backend was asked for"
        lines.append(f"  because {why}")
    else:
        backend, authority, sentence, advice = _plan(op, request)
        why = f"{_SPOKE[authority]} takes {serving.backend}"
        if backend != serving.backend:
            why = f"{_SPOKE[authority]} takes {backend}, and {serving.backend} where that cannot serve"
        lines.append(f"  because {why}: {sentence}")
    for candidate in entries[op].implementations:
        if candidate is not serving:
            lines.append(f"  not {candidate.backend} ({candidate.description}): {candidate.refusal(*request) or why}")
    return lines, advice
