"""Exact shortcuts: whether the towers may leave out what cannot change their result, and how to forbid it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from clipfast.ops.dispatch import environment_switch

# one for the process, as the backend is: the backward pass computes checkpointed blocks again in threads of its own
_enabled = environment_switch("CLIPFAST_EXACT_SHORTCUTS")


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


def has_hooks(module: nn.Module) -> bool:
    """Return whether a hook waits for a module itself, forward or backward."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def hooks_of(module: nn.Module) -> list[Callable[..., object]]:
    """Return the hooks that wait for a module itself, forward and backward."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for hooks in kinds for hook in hooks.values()]


def is_observed(module: nn.Module) -> bool:
    """Return whether a hook on a module, or on one inside it, would see what a shortcut leaves out.

    The hooks of PyTorch's own wrappers (FSDP2 gathers parameters in them) do not look.
    """
    return any(
        has_hooks(part) and not all(_is_of_pytorch(hook) for hook in hooks_of(part)) for part in module.modules()
    )


def _is_of_pytorch(hook: object) -> bool:
    owner = getattr(hook, "__self__", None)
    return (type(owner) if owner is not None else hook).__module__.startswith("torch.distributed")
