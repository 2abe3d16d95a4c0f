"""What a twin stands for, and whether that still is what it was; or why there is no twin."""

from __future__ import annotations

import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as _global

from clipfast.models.twin_blocks import Refusal
from clipfast.modules import plainness
from clipfast.modules.shortcuts import has_hooks, hooks_of
from clipfast.modules.watch import Watch, modules_in

if TYPE_CHECKING:
    from clipfast.models.accelerated import Accelerated

# calls that a changed tower runs as it is before it is judged again, at most
_PATIENCE = 64


class Twin:
    """A twin and what it stands for; it keeps no reference to the original, which holds it.

    Args:
        original: The module that it stands for.
        tower: The twin.
        replaced: The names of the original's children that the twin computes in the place of.

    Raises:
        Refusal: A module that it stands for, or the original's own code, was changed.
    """

    def __init__(self, original: Accelerated, tower: nn.Module, replaced: Iterable[str]) -> None:
        self.tower: nn.Module | None = tower
        self.refusal: str | None = None
        self._replaced = tuple((name, original._modules[name]) for name in replaced)
        self._paths = {
            module: f"{name}.{path}" if path else name
            for name, child in self._replaced
            for module, path in modules_in(child).items()
        }
        own = original.own_references()
        self._names = frozenset(name for owner, name, _ in own if owner is original._original_class) - {"forward"}
        reason = plainness.replaced_function(own) or original.changed_method(self._names)
        if reason is not None:
            raise Refusal(reason)
        # under torch.compile the watch's comparison is made once, and these are guarded
        self._guarded = tuple((m, type(m), tuple(m._modules.values())) for m in self._paths)
        self._watch = Watch(self._paths, own)
        self._noisy = tuple(
            (m, name) for m in self._paths for name in ("p", "drop_prob", "dropout") if _is_rate(m, name)
        )
        self._baked = _baked(original)

    def is_whole(self, original: Accelerated) -> bool:
        """Return whether the original is as it was when the twin was made, its weights and hooks apart."""
        for name, child in self._replaced:
            if original._modules.get(name) is not child:
                return False
        return (
            original.__dict__.keys().isdisjoint(self._names)
            and _equal(_baked(original), self._baked)
            and self._watch.holds()
        )

    def is_whole_while_compiling(self, original: Accelerated) -> bool:
        """Return as :meth:`is_whole` to a compiler, which looks again when types, children or methods change."""
        for name, child in self._replaced:
            if original._modules.get(name) is not child:
                return False
        for module, kind, children in self._guarded:
            if type(module) is not kind or not isinstance(module.forward, types.MethodType):
                return False
            if tuple(module._modules.values()) != children:
                return False
        return self._holds_now()

    def _holds_now(self) -> bool:
        return self._watch.holds()

    # what torch.compiler.assume_constant_result does, which imports the compiler
    _holds_now._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def is_on_meta(self) -> bool:
        """Return whether weights are elsewhere until the original's code asks for them."""
        return self._watch.is_on_meta()

    def observer(self) -> str | None:
        """Return which hook waits for a module that the twin does not call as the original would; None for none."""
        if torch.compiler.is_compiling() or self._watch.is_hooked():
            for m, path in self._paths.items():
                if has_hooks(m) and not all(_is_idle(hook) for hook in hooks_of(m)):
                    return f"a hook waits for {path}"
        if _global._has_any_global_hook() and any(
            not _is_idle(hook)
            for kind in (
                _global._global_forward_hooks,
                _global._global_forward_pre_hooks,
                _global._global_backward_hooks,
                _global._global_backward_pre_hooks,
            )
            for hook in kind.values()
        ):
            return "a hook waits for all modules"
        return None

    def noise(self) -> str | None:
        """Return which module of the original would drop values at random now; None for none."""
        for module, name in self._noisy:
            if module.training and getattr(module, name):
                return f"{self._paths[module]} drops values at random in training"
        return None


class Refused:
    """Why a module that was accelerated runs its original code, until it is changed again."""

    tower = None

    def __init__(self, original: Accelerated, refusal: str, patience: int = 0) -> None:
        self.refusal = refusal
        self._patience, self._waited = patience, 0
        self._children = tuple(original._modules.values())
        self._watch = Watch(modules_in(*(c for c in self._children if c is not None)), original.own_references())
        self._baked = _baked(original)

    def is_whole(self, original: Accelerated) -> bool:
        """Return whether nothing changed, or it is too early to look again."""
        if self._waited < self._patience:
            # a module that changes at every call would be judged at every call
            self._waited += 1
            return True
        return (
            tuple(original._modules.values()) == self._children
            and _equal(_baked(original), self._baked)
            and self._watch.holds()
        )

    def next_patience(self) -> int:
        """Return how many calls to wait after one more refusal."""
        return min(_PATIENCE, 2 * self._patience + 1)


def _baked(original: Accelerated) -> tuple[Any, ...]:
    try:
        return original.baked_attributes()
    except Exception as error:  # parts are gone that were there
        return (str(error),)


def _equal(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    try:
        return a == b
    except Exception:  # tensors that are not the same
        return False


def _is_rate(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_idle(hook: object) -> bool:
    """Return whether a hook does not mind which modules compute.

    transformers' hooks wait for calls that ask for hidden states or attention weights, which do not come from modules
    here; the first such call leaves them behind for good. Those that it puts on embeddings for checkpointing want
    their results to have gradients, and embeddings are called. PyTorch's counter of operations asks where it is.
    """
    home = getattr(hook, "__module__", "")
    if home == "transformers.modeling_utils":
        return getattr(hook, "__name__", "") == "make_inputs_require_grads"
    return home in ("transformers.utils.output_capturing", "torch.utils.module_tracker")
