"""What a setting may be: rules that name it, say what came and what was expected."""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Rule:
    """What values of a setting make sense, beside their type.

    Attributes:
        words: What is expected, for an error.
        holds: Whether a value is that.
    """

    words: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """A number from ``least`` up."""
    return Rule(f"at least {least:,}", lambda value: value >= least)


def above(low: float) -> Rule:
    """A number that is greater than ``low``."""
    return Rule("a positive number" if low == 0 else f"more than {low:,}", lambda value: value > low)


def between(least: float, most: float) -> Rule:
    """A number from ``least`` to ``most``, both included."""

    def words(value: float) -> str:
        return f"{value:,}"

    return Rule(f"{words(least)} to {words(most)}", lambda value: least <= value <= most)


def share(*, whole: bool = False) -> Rule:
    """A share: from 0 up to 1, which is included where ``whole`` says so."""
    if whole:
        return between(0, 1)
    return Rule("a share from 0 up to, not including, 1", lambda value: 0 <= value < 1)


# what is looked for, or told apart, where it is used
SOME_TEXT = Rule("a text that is not empty", lambda value: bool(value.strip()))
# every value of the type
ANY = Rule("any", lambda value: True)


def check_setting(name: str, value: Any, kind: Any, rule: Rule = ANY) -> None:
    """Check one setting.

    Args:
        name: Its name, for the error.
        value: What came.
        kind: Its type: bool, int, float (finite), str, a ``Literal``, or a union of one of them with None.
        rule: What its values must be beside that; None is not asked.

    Raises:
        ValueError: It is something else: the name, what came and what was expected.
    """
    choices = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if value is None and type(None) in choices:
        return
    (kind,) = (choice for choice in choices if choice is not type(None))
    if get_origin(kind) is Literal:
        known = get_args(kind)
        if value not in known:
            raise _unexpected(name, value, ", ".join(map(repr, known[:-1])) + f" or {known[-1]!r}")
        return
    if not _is_a(value, kind):
        raise _unexpected(name, value, kind.__name__)
    if kind is float and not math.isfinite(value):
        raise _unexpected(name, value, f"a finite number, {rule.words}" if rule is not ANY else "a finite number")
    if not rule.holds(value):
        raise _unexpected(name, value, rule.words)


def check_settings(values: Mapping[str, Any], kinds: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check settings by name, in order; see :func:`check_setting`."""
    for name, value in values.items():
        check_setting(name, value, kinds[name], rules.get(name, ANY))


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    return isinstance(value, kind)


def _unexpected(name: str, value: Any, words: str) -> ValueError:
    return ValueError(f"{name}: got {value!r}, expected {words}")
