"""The tuned file: which implementation ``clipfast tune`` found the fastest on this machine.

It is JSON, one file for a device and its versions, in the user's cache folder; docs/tuning.md describes it. Reading it
runs no code. A file that says anything it should not is not used at all, and neither is one that was made on another
device or with other versions: the rule serves, and :func:`find` says in one sentence why.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from clipfast.files import cache_folder, short, write_atomically
from clipfast.ops import tuned_format
from clipfast.ops.tuned_format import Choice

VARIABLE = "CLIPFAST_TUNED"
NONE = "no tuned file"
OFF = f"{VARIABLE}=off is set"
_LOCK_S = 10.0


@dataclass(frozen=True)
class Tuned:
    """A tuned file that counts here.

    Attributes:
        path: Where it lies.
        fastest: The backends that serve in the place of the rule's, by op and shape class
            (:func:`clipfast.ops.dispatch.shape_class`).
        confirmed: The rule's backends that were measured here and stand, likewise.
        choices: All of them, with their figures.
        models: What was tuned for: names of models with precisions.
        date: When it was last written, UTC, as ISO 8601 has it.
    """

    path: Path
    fastest: dict[str, dict[str, str]] = field(default_factory=dict)
    confirmed: dict[str, dict[str, str]] = field(default_factory=dict)
    choices: Mapping[str, Mapping[str, Choice]] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    date: str = ""

    @property
    def days(self) -> int:
        """How old it is; a clock that was set back makes nothing younger than new."""
        made = datetime.datetime.fromisoformat(self.date)
        made = made if made.tzinfo else made.replace(tzinfo=datetime.timezone.utc)
        return max(0, (datetime.datetime.now(datetime.timezone.utc) - made).days)


def _tuned(path: Path, choices: Mapping[str, Mapping[str, Choice]], models: tuple[str, ...], date: str) -> Tuned:
    fastest: dict[str, dict[str, str]] = {}
    confirmed: dict[str, dict[str, str]] = {}
    for op, of_op in choices.items():
        for key, choice in of_op.items():
            same = choice.backend == choice.rule
            (confirmed if same else fastest).setdefault(op, {})[key] = choice.backend
    return Tuned(path, fastest, confirmed, choices, models, date)


# ----------------------------------------------------------------------------------------------------------------------
# reading


def find(device: torch.device) -> tuple[Tuned | None, str]:
    """Return the tuned file that counts on a device, and when it was made; or None, and why there is none.

    ``CLIPFAST_TUNED`` names another file than that of the cache folder, or is ``off``. Nothing is kept: who asks often
    keeps the answer. It never raises for what a file holds.

    Returns:
        The second is :data:`NONE` where nobody has tuned, and otherwise says what is wrong with which file.
    """
    if _instead is not None:
        return _instead
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None, OFF
    where = f"{short(Path(wanted))} ({VARIABLE})" if wanted else "the cache folder"
    try:
        path = Path(wanted).expanduser() if wanted else path_of(device)
        where = where if wanted else short(path)
        if not wanted and not path.exists():
            return None, _why_none(device, path)
        found = read(path, device)
    except (OSError, RuntimeError) as error:
        # RuntimeError: a home folder that is not there
        return None, f"{where} cannot be read: {getattr(error, 'strerror', None) or error}"
    except ValueError as error:
        return None, f"{where}: {error}"
    return found, f"tuned on {found.date[:10]} ({where})"


_instead: tuple[Tuned | None, str] | None = None


@contextlib.contextmanager
def instead(choices: Mapping[str, Mapping[str, Choice]], why: str) -> Iterator[None]:
    """Let :func:`find` return these choices inside a ``with`` block, whatever files there are; None if there are none.

    For who tries them. What was asked before does not know: ``clipfast.ops.plan.reset`` makes it ask again.
    """
    global _instead
    found = _tuned(Path(why), choices, (), "") if choices else None
    before, _instead = _instead, (found, why)
    try:
        yield
    finally:
        _instead = before


def path_of(device: torch.device) -> Path:
    """Return where the tuned file of a device lies, or would, with these versions of everything.

    Raises:
        OSError: There is no cache folder.
    """
    device_facts, software = _identity(device)
    digest = hashlib.sha256(json.dumps([device_facts, software], sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "tuned" / f"{_stem(device_facts)}-{digest}.json"


def read(path: Path, device: torch.device | None) -> Tuned:
    """Read a tuned file.

    Args:
        path: The file.
        device: The device that it is to be used on; None to take it whatever it was made on.

    Raises:
        ValueError: The file is none, or says what it should not, or was not made on this device with these versions.
        OSError: It cannot be read.
    """
    content = tuned_format.parse(path)
    tuned_format.validate(content)
    if device is not None:
        for got, expected in zip((content["device"], content["versions"]), _identity(device), strict=True):
            if differs := _difference(got, expected):
                raise ValueError(differs)
    choices = {op: {key: Choice(**c) for key, c in of_op.items()} for op, of_op in content["choices"].items()}
    return _tuned(path, choices, tuple(content["models"]), content["date"])


def _identity(device: torch.device) -> tuple[dict[str, str], dict[str, str]]:
    # from here, because clipfast.ops.identity asks for the op library, which asks for clipfast.ops.dispatch
    from clipfast.ops import identity

    return identity.of_device(device), identity.of_software(device.type)


def _stem(device_facts: Mapping[str, str]) -> str:
    """Return a device's name as a file's."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device_facts["name"]).strip("-")[:60] or "unnamed"
    return name if device_facts["type"] == "cuda" else f"{device_facts['type']}-{name}"


def _why_none(device: torch.device, path: Path) -> str:
    """Return why there is no file: none was made, or one for something else."""
    others = sorted(path.parent.glob(f"{_stem(_identity(device)[0])}-*.json"), key=lambda p: p.stat().st_mtime)
    if others:
        try:
            read(others[-1], device)
        except (OSError, ValueError) as error:
            return f"{short(others[-1])}: {error}"
    return NONE


def _difference(got: Mapping[str, str], expected: Mapping[str, str]) -> str | None:
    """Return in what a file's device or versions are other than those here, or None."""
    for name in expected:
        if got.get(name) != expected[name]:
            return f"it was made for {name} {got.get(name, 'unknown')}, this is {name} {expected[name]}"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# writing


def write(
    device: torch.device,
    choices: Mapping[str, Mapping[str, Choice]],
    models: tuple[str, ...] = (),
    path: Path | None = None,
) -> Path:
    """Write choices to a device's tuned file, beside those that it holds for other shape classes.

    The file is replaced whole. Processes that write at the same time wait for each other, and each keeps what the
    others wrote; where the file system has no locks, the last of them may win, and the file is whole all the same.

    Args:
        device: What was tuned.
        choices: By op and shape class.
        models: What for.
        path: Another file than :func:`path_of` the device.

    Returns:
        Where it lies.

    Raises:
        OSError: It cannot be written.
        ValueError: ``path`` is there and is no tuned file.
    """
    target = path or path_of(device)
    if path is not None:
        check_target(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    device_facts, software = _identity(device)
    with _locked(target.parent):
        merged: dict[str, dict[str, Choice]] = {}
        with contextlib.suppress(OSError, ValueError):
            before = read(target, device)
            merged = {op: dict(of_op) for op, of_op in before.choices.items()}
            models = tuple(dict.fromkeys((*before.models, *models)))
        for op, of_op in choices.items():
            merged.setdefault(op, {}).update(of_op)
        content = {
            "format": tuned_format.FORMAT,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": device_facts,
            "versions": software,
            "models": list(models),
            "choices": {op: {key: asdict(c) for key, c in sorted(merged[op].items())} for op in sorted(merged)},
        }
        tuned_format.validate(content)
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
        write_atomically(target, lambda file: file.write(f"{text}\n".encode()))
    return target


def check_target(path: Path) -> None:
    """Raise a ValueError where a file is there that is no tuned file, which nobody wants replaced."""
    try:
        there = path.exists()
    except OSError:
        # what keeps it from being looked at keeps it from being written
        return
    if there:
        try:
            tuned_format.validate(tuned_format.parse(path))
        except ValueError as error:
            raise ValueError(f"{path} is there and is no tuned file: {error}") from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder's files, for as long as they ask too."""
    try:
        import fcntl
    except ImportError:
        # not on POSIX: a file is replaced whole all the same
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        until = time.monotonic() + _LOCK_S
        while time.monotonic() < until:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                # somebody writes, which takes milliseconds; one who was stopped meanwhile is not waited for
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)
