"""The process' plan: for every device, which implementation ``auto`` takes for a class of calls, and who says so.

One order of authority: the file that ``clipfast tune`` wrote for this device (:mod:`clipfast.ops.tuned`), a measurement
of this card that is shipped (:mod:`clipfast.ops.measured`), the rule (:mod:`clipfast.ops.rules`). A backend that was
forced stands above the plan, in :mod:`clipfast.ops.dispatch`; so does what an implementation refuses.

A device's part is read when it is first asked for, and stays as it is until :func:`reset` or :func:`adopt`: what tunes
or writes a file afterwards changes no choice of a running process. Ranks of one run share rank 0's plan: ::

    texts = gather(plan.export(device))     # of all ranks
    plan.adopt(plan.merge(texts))           # the same on every rank: the devices of texts[0], what any rank refuses
    log(plan.digest(device))

A change is a new :data:`generation`, which ``torch.compile`` guards on.
"""

from __future__ import annotations

import hashlib
import json
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from clipfast.ops import library, measured, rules, tuned

SCHEMA = 1

Authority = Literal["tuned", "measured", "rule"]
Fastest = dict[str, dict[str, str]]


class Decision(NamedTuple):
    """What the plan says of a class of calls.

    Attributes:
        backend: Which one ``auto`` takes, where that can serve the call.
        authority: Who says so: ``"tuned"``, ``"measured"`` or ``"rule"``.
        sentence: The same for a reader.
        advice: Why no measurement speaks, and what would; empty where one does.
    """

    backend: str
    authority: Authority
    sentence: str
    advice: str = ""


@dataclass(frozen=True)
class _Part:
    """What is known of one device.

    ``confirmed`` is what tuning left as the rule has it; ``why_not_tuned`` says why a tuned file is not used.
    """

    machine: rules.Machine
    name: str
    tuned: Fastest = field(default_factory=dict)
    confirmed: Fastest = field(default_factory=dict)
    tuned_path: str = ""
    why_not_tuned: str = ""
    measured: Fastest = field(default_factory=dict)


#: Another string after every change. Code that a compiler traces reads it, so that a change compiles anew. A string,
#: because compilers make a variable of a number that changes.
generation = "plan 0"

_lock = threading.RLock()
_parts: dict[tuple[str, int | None], _Part] = {}
_adopted: dict[str, _Part] = {}
_decisions: dict[tuple[rules.Key, str, int | None], Decision] = {}
# of another rank: by the name of a check that a kernel did not pass there, and by op where a kernel failed
_refused: dict[str, str] = {}
_failed: dict[str, str] = {}
_listeners: list[Callable[[], None]] = []
# what tells of this process itself
_reports: dict[str, list[Callable[[], dict[str, str]]]] = {"refused": [], "failed": []}


def on_change(listener: Callable[[], None]) -> None:
    """Call a function after every change, for as long as the process lives."""
    _listeners.append(listener)


def report(what: str, tell: Callable[[], dict[str, str]]) -> None:
    """Have :func:`export` ask a function which kernels this process does not use, and why.

    Args:
        what: ``"refused"``, by the name of a check, or ``"failed"``, by op.
        tell: Returns them, with their reasons.
    """
    _reports[what].append(tell)


def decision(op: str, key: rules.Key, device: torch.device, backends: Sequence[str] | None = None) -> Decision:
    """Return which backend the plan takes for a class of calls.

    Args:
        op: The op, such as ``"layer_norm"``.
        key: The class (``clipfast.ops.dispatch.key_of(op, *args)``); ``key.name`` is what files know it by.
        device: Where the call runs.
        backends: Those that the op has; what a file says beside them does not count. None: any.
    """
    # the dictionary is another one after every change: what was decided before is not kept behind it
    decisions = _decisions
    known = decisions.get((key, device.type, device.index))
    if known is None:
        known = decisions[key, device.type, device.index] = _decide(op, key, part_of(device), backends)
    return known


def _decide(op: str, key: rules.Key, part: _Part, backends: Sequence[str] | None) -> Decision:
    name = key.name
    for authority, fastest, where in (
        ("tuned", part.tuned, f"in the tuned file {part.tuned_path}"),
        ("measured", part.measured, f"on {part.name}, as shipped with clipfast"),
    ):
        backend = fastest.get(op, {}).get(name)
        if backend is not None and (backends is None or backend in backends):
            return Decision(backend, authority, f"{backend} was the fastest {where} ({name})")
    verdict = rules.decide(key, part.machine)
    if part.why_not_tuned == tuned.OFF:
        advice = tuned.OFF
    elif part.why_not_tuned:
        advice = f"the tuned file is not used: {part.why_not_tuned}; `clipfast tune` writes a new one"
    elif name in part.confirmed.get(op, {}):
        advice = f"measured here, and nothing was faster beyond doubt: {part.tuned_path}"
    elif part.tuned_path:
        advice = f"{part.tuned_path} has no entry for {name}; `clipfast tune` measures more models"
    else:
        advice = "`clipfast tune` would measure it here"
    return Decision(verdict.backend, "rule", f"{verdict.says} (the rule for {name})", advice)


def part_of(device: torch.device) -> _Part:
    """Return what the plan knows of a device; asks and reads what it needs once."""
    adopted = _adopted.get(device.type)
    if adopted is not None:
        return adopted
    where = device.type, device.index
    part = _parts.get(where)
    if part is None:
        with _lock:
            part = _parts.get(where)
            if part is None:
                part = _parts[where] = _found(device)
    return part


def _found(device: torch.device) -> _Part:
    machine, name = machine_of(device), name_of(device)
    mine, reason = tuned.find(device)
    shipped = measured.CARDS.get(name)
    return _Part(
        machine,
        name,
        tuned={} if mine is None else mine.fastest,
        confirmed={} if mine is None else mine.confirmed,
        tuned_path="" if mine is None else str(mine.path),
        # where there is no file there is nothing to say
        why_not_tuned="" if mine is not None or reason == tuned.NONE else reason,
        measured={} if shipped is None else shipped.fastest,
    )


def machine_of(device: torch.device) -> rules.Machine:
    """Return what the rule knows a device by."""
    if device.type == "cuda" and torch.version.hip is None:
        return rules.Machine("cuda", _of_card(torch.cuda.get_device_capability, device))
    if device.type == "cpu":
        amx = torch.cpu._is_amx_tile_supported()
        arm = platform.machine() in ("aarch64", "arm64")
        return rules.Machine("cpu", amx=amx, native_amx=amx and library.why_no_amx() is None, arm=arm)
    return rules.Machine(device.type)


def name_of(device: torch.device) -> str:
    """Return what the table of measurements knows a device by: a card's name, or the type of device."""
    return (device.type == "cuda" and _of_card(torch.cuda.get_device_name, device)) or device.type


def _of_card(ask: Callable[..., Any], device: torch.device) -> Any:
    """Return what a card tells, or None where there is none: fake tensors may be of a card that is not here."""
    try:
        return ask(device.index)
    except (AssertionError, RuntimeError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# what other ranks say


def refusal(check: str) -> str | None:
    """Return why a kernel is not used although it passes its check here: on another rank it did not. Or None."""
    return _refused.get(check) if _refused else None


def failure(op: str) -> str | None:
    """Return why no kernel of an op is used although none has failed here: on another rank one has. Or None."""
    return _failed.get(op) if _failed else None


# ----------------------------------------------------------------------------------------------------------------------
# as text


def export(device: torch.device | None = None) -> str:
    """Return the plan as JSON: of the CPU, of the devices that were asked for, and of ``device``."""
    return json.dumps(_content(device), sort_keys=True)


def digest(device: torch.device | None = None) -> str:
    """Return a short hash of all that decides: tuned and shipped entries, the rule's version, failed checks.

    Args:
        device: A device that counts although nothing was asked of it yet.
    """
    content = _content(device)
    for part in content["devices"].values():
        # who decides the same has the same plan, wherever its file lies
        del part["confirmed"], part["tuned_path"], part["why_not_tuned"], part["name"]
    for what in ("refused", "failed"):
        content[what] = sorted(content[what])
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def merge(texts: Iterable[str]) -> str:
    """Return the plan of the first of several ranks, without the kernels that did not pass a check on all of them.

    Args:
        texts: What :func:`export` gave on each rank, rank 0 first.

    Raises:
        ValueError: One of them is no plan, or there is none.
    """
    contents = [_read(text) for text in texts]
    if not contents:
        raise ValueError("plan.merge(texts): got none, expected the plan of at least one rank")
    for what in ("refused", "failed"):
        contents[0][what] = {name: why for content in reversed(contents) for name, why in content[what].items()}
    return json.dumps(contents[0], sort_keys=True)


def adopt(text: str) -> None:
    """Put another rank's plan in the place of this process' own, until :func:`reset`.

    Args:
        text: What :func:`export` or :func:`merge` gave.

    Raises:
        ValueError: It is no plan, or one of a clipfast with other rules.
    """
    content = _read(text)
    parts = {kind: _part(entry) for kind, entry in content["devices"].items()}
    with _lock:
        for memory, new in ((_adopted, parts), (_refused, content["refused"]), (_failed, content["failed"])):
            memory.clear()
            memory.update(new)
        _changed()


def reset() -> None:
    """Go back to the process' own plan, and read what it goes by anew."""
    with _lock:
        for memory in (_adopted, _refused, _failed, _parts):
            memory.clear()
        _changed()


def _changed() -> None:
    global generation, _decisions
    generation = f"plan {int(generation.split()[1]) + 1}"
    _decisions = {}
    for listener in _listeners:
        listener()


def _content(device: torch.device | None) -> dict[str, Any]:
    part_of(torch.device("cpu"))
    if device is not None:
        # one name for the current card
        current = device.index is None and device.type == "cuda"
        part_of(torch.device("cuda", torch.cuda.current_device()) if current else device)
    with _lock:
        # the lowest card stands for all
        found = {kind: part for (kind, _), part in sorted(_parts.items(), key=lambda p: -(p[0][1] or 0))} | _adopted
        refused, failed = dict(_refused), dict(_failed)
    here = {what: {k: v for tell in tellers for k, v in tell().items()} for what, tellers in _reports.items()}
    return {
        "schema": SCHEMA,
        "rules": rules.VERSION,
        "devices": {kind: _entry(part) for kind, part in found.items()},
        "refused": refused | here["refused"],
        "failed": failed | here["failed"],
    }


def _entry(part: _Part) -> dict[str, Any]:
    entry = {name: value for name, value in vars(part).items() if name != "machine"}
    return entry | {"machine": part.machine._asdict()}


def _part(entry: dict[str, Any]) -> _Part:
    machine = entry["machine"]
    capability = None if machine["capability"] is None else tuple(machine["capability"])
    return _Part(**(entry | {"machine": rules.Machine(**(machine | {"capability": capability}))}))


def _read(text: str) -> dict[str, Any]:
    wrong = f"plan.adopt(text): got {text[:60]!r}, expected what plan.export gives"
    try:
        content = json.loads(text)
        versions = content["schema"], content["rules"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(wrong) from error
    if versions != (SCHEMA, rules.VERSION):
        raise ValueError(
            f"plan.adopt(text): got schema {versions[0]} and rules {versions[1]}, expected {SCHEMA} and "
            f"{rules.VERSION}: every rank needs the same clipfast"
        )
    try:
        for entry in content["devices"].values():
            _part(entry)
        return content | {name: dict(content[name]) for name in ("refused", "failed")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(wrong) from error
