"""Calls that a library's original code served: how many, and why."""

from __future__ import annotations

import threading
from collections import Counter
from weakref import WeakKeyDictionary

import torch
from torch import nn

# beside the modules, so that copies, pickles and state dicts know nothing of it
_counts: WeakKeyDictionary[nn.Module, Counter[str]] = WeakKeyDictionary()
_lock = threading.Lock()


def count(module: nn.Module, reason: str) -> None:
    """Count a call of an accelerated module that its original code serves; a call that is being compiled is none."""
    if torch.compiler.is_compiling():
        return
    with _lock:
        _counts.setdefault(module, Counter())[reason] += 1


def counted(module: nn.Module) -> dict[str, int]:
    """Return how many calls of a module were counted for each reason, the most frequent first."""
    with _lock:
        return dict(_counts.get(module, Counter()).most_common())
