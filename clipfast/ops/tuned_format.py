"""What a tuned file holds (docs/tuning.md has the schema), and that it holds nothing else."""

from __future__ import annotations

import datetime
import json
import math
import stat
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from clipfast.ops import registry

FORMAT = 1
_FIELDS = {"format", "date", "device", "versions", "models", "choices"}
_MOST_BYTES = 4 * 2**20
_MOST_CHOICES = 10_000
_MOST_LETTERS = 300


@dataclass(frozen=True)
class Choice:
    """What tuning found for one shape class of one op.

    Attributes:
        backend: The one that serves.
        rule: The one that serves without a tuned file. Where it is the same, the rule stands.
        lead: The rule's time over the backend's, the median of the rounds; 1 where the rule stands.
        rounds: How many rounds of all sides were timed.
        why: In a few words.
    """

    backend: str
    rule: str
    lead: float = 1.0
    rounds: int = 0
    why: str = ""


def parse(path: Path) -> Any:
    """Return the JSON in a file.

    Raises:
        ValueError: There is none, or too much of it.
        OSError: It cannot be read.
    """
    # no pipe that never ends, no device, nothing that fills memory
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("it is no file")
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES} bytes")
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        what = "it nests too deeply" if isinstance(error, RecursionError) else str(error)[:80]
        raise ValueError(f"it is damaged or cut off ({what})") from error


def validate(content: Any) -> None:
    """Raise a ValueError where a file's content is not what :func:`write` writes."""
    _expect_keys("the file", content, _FIELDS, first="format")
    if content["format"] != FORMAT or isinstance(content["format"], bool):
        raise ValueError(f"format: got {_shown(content['format'])}, expected {FORMAT}")
    _expect_text("date", content["date"])
    try:
        datetime.datetime.fromisoformat(content["date"])
    except ValueError:
        raise ValueError(f"date: got {_shown(content['date'])}, expected one of ISO 8601") from None
    for name in ("device", "versions"):
        if not isinstance(content[name], dict) or len(content[name]) > 50:
            raise ValueError(f"{name}: got {_shown(content[name])}, expected an object of texts")
        for key, value in content[name].items():
            _expect_text(f"{name}.{key[:50]}", value)
    if not isinstance(content["models"], list) or len(content["models"]) > 1000:
        raise ValueError(f"models: got {_shown(content['models'])}, expected a list of texts")
    for model in content["models"]:
        _expect_text("models", model)
    _validate_choices(content["choices"])


def _validate_choices(choices: Any) -> None:
    known = {op: registry.backends(op) for op in registry.operations()}
    if not isinstance(choices, dict):
        raise ValueError(f"choices: got {_shown(choices)}, expected an object by op")
    count = 0
    for op, of_op in choices.items():
        if op not in known:
            raise ValueError(f"choices: got op {_shown(op)}, expected one of {', '.join(known)}")
        if not isinstance(of_op, dict):
            raise ValueError(f"choices.{op}: got {_shown(of_op)}, expected an object by shape class")
        count += len(of_op)
        if count > _MOST_CHOICES:
            raise ValueError(f"choices: got more than {_MOST_CHOICES}")
        for key, choice in of_op.items():
            where = f"choices.{op}"
            _expect_text(f"{where}'s shape class", key)
            _expect_keys(f"{where}[{_shown(key)}]", choice, {f.name for f in fields(Choice)})
            for name in ("backend", "rule"):
                if not isinstance(choice[name], str) or choice[name] not in known[op]:
                    raise ValueError(f"{where}: got {name} {_shown(choice[name])}, expected one of {known[op]}")
            _expect_text(f"{where}.why", choice["why"])
            if type(choice["lead"]) not in (float, int) or not 0 < choice["lead"] < math.inf:
                raise ValueError(f"{where}: got lead {_shown(choice['lead'])}, expected a positive number")
            if type(choice["rounds"]) is not int or choice["rounds"] < 0:
                raise ValueError(f"{where}: got rounds {_shown(choice['rounds'])}, expected a count")


def _expect_keys(where: str, value: Any, expected: set[str], first: str | None = None) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_shown(value)}, expected an object")
    if first is not None and first not in value:
        raise ValueError(f"{where} has no {first!r}: it is no tuned file")
    if value.keys() != expected:
        wrong = sorted(value.keys() ^ expected)
        raise ValueError(f"{where}: {_shown(wrong[0])} is {'unknown' if wrong[0] in value else 'missing'}")


def _expect_text(where: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > _MOST_LETTERS or not value.isprintable():
        raise ValueError(f"{where}: got {_shown(value)}, expected a line of text")


def _shown(value: Any) -> str:
    """Return a value of a file for a message: short and in one line, whatever it is."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
