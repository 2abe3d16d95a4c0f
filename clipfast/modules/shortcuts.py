"""Exact shortcuts: whether the towers may leave out what cannot change their result, and how to forbid it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def _from_environment() -> bool:
    value = os.environ.get("CLIPFAST_EXACT_SHORTCUTS", "1")
    if value not in ("0", "1"):
        raise ValueError(f"CLIPFAST_EXACT_SHORTCUTS: got {value!r}, expected '0' or '1'")
    return value == "1"


# one for the process, as the backend is: the backward pass computes checkpointed blocks again in threads of its own
_enabled = _from_environment()


@contextmanager
def exact_shortcuts(enabled: bool) -> Iterator[None]:
    """Allow or forbid, inside a ``with`` block and for the whole process, what the towers leave out.

    Args:
        enabled: Whether captions are packed up to the token that is read, and the last blocks computed for the one
            token that is read. Both are on by default and change nothing but rounding; without them every token is
            computed, as other libraries do. The environment variable ``CLIPFAST_EXACT_SHORTCUTS`` (0 or 1) sets the
            same for a process.
    """
    global _enabled
    previous, _enabled = _enabled, bool(enabled)
    try:
        yield
    finally:
        _enabled = previous


def shortcuts_enabled() -> bool:
    """Return whether exact shortcuts are allowed."""
    return _enabled


def is_observed(module: nn.Module) -> bool:
    """Return whether a hook on a module, or on one inside it, would see what a shortcut leaves out.

    The hooks of PyTorch's own wrappers (FSDP2 gathers parameters in them) do not look.
    """
    for part in module.modules():
        for hooks in (
            part._forward_hooks,
            part._forward_pre_hooks,
            part._backward_hooks,
            part._backward_pre_hooks,
        ):
            if hooks and any(not _is_of_pytorch(hook) for hook in hooks.values()):
                return True
    return False


def _is_of_pytorch(hook: object) -> bool:
    owner = getattr(hook, "__self__", None)
    return (type(owner) if owner is not None else hook).__module__.startswith("torch.distributed")
