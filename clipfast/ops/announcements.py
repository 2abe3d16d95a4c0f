"""What is said, once a process, where a call is not served as somebody asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from clipfast.ops import switches
from clipfast.ops.switches import FallbackWarning, is_wanted

_announced: set[tuple[str, str, str]] = set()
_told: set[tuple[str, str]] = set()


def mark_told(op: str, reason: str) -> None:
    """Spare the user a second warning of why a backend that was asked for does not serve an op."""
    _told.add((op, reason))


def announce_refusal(op: str, reason: str) -> None:
    """Warn that the backend that was asked for does not serve an op."""
    wanted = switches.current.wanted
    key = (op, wanted, reason)
    if key not in _announced and (op, reason) not in _told and not torch.compiler.is_compiling():
        _announced.add(key)
        warnings.warn(
            f"clipfast: {op} does not use the {wanted} backend that was asked for: {reason}",
            FallbackWarning,
            stacklevel=6,
        )


def announce_slower(what: str, how: str, words: Callable[[str], str] = str) -> None:
    """Warn, once a process, that ``auto`` has to do with a slower implementation.

    Args:
        what: What is slower.
        how: How it is served, or why.
        words: Makes of ``how`` what is said; called when it is, not with every call of an op.
    """
    key = (what, "auto", how)
    if is_wanted("auto") and key not in _announced and not torch.compiler.is_compiling():
        _announced.add(key)
        warnings.warn(f"clipfast: {what} {words(how)}", FallbackWarning, stacklevel=5)
