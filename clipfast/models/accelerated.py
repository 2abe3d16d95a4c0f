"""What a module that clipfast accelerates becomes: an instance of a subclass of its own class.

The subclass is made on the fly and keeps the class's name and module, since libraries tell classes apart by them
(configurations that are saved, wrapping policies, registries of outputs).
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as _global

from clipfast.models.twins import Refusal
from clipfast.modules.shortcuts import has_hooks, hooks_of

_TWIN = "_clipfast_twin"
_OPTIONS = "_clipfast_options"


class AccelerateWarning(UserWarning):
    """A part of a model is served by its original code."""


class Twin:
    """A twin and what it stands for; it keeps no reference to the original, which holds it.

    Args:
        original: The module that it stands for.
        tower: The twin.
        replaced: The names of the original's children that the twin computes in the place of.
    """

    def __init__(self, original: nn.Module, tower: nn.Module, replaced: Iterable[str]) -> None:
        self.tower = tower
        self._replaced = tuple((name, original._modules[name]) for name in replaced)
        self._modules = tuple(m for _, child in self._replaced for m in child.modules())
        self._classes = tuple(type(m) for m in self._modules)
        self._children = tuple((m, tuple(m._modules.values())) for m in self._modules if m._modules)
        self._noisy = tuple(
            (m, name) for m in self._modules for name in ("p", "drop_prob", "dropout") if _is_rate(m, name)
        )

    def is_whole(self, original: nn.Module) -> bool:
        """Return whether the original's modules are those that the twin was made of."""
        for name, child in self._replaced:
            if original._modules.get(name) is not child:
                return False
        for module, children in self._children:
            if tuple(module._modules.values()) != children:
                return False
        return tuple(type(m) for m in self._modules) == self._classes

    def is_observed(self) -> bool:
        """Return whether a hook waits for a module that the twin does not call as the original would."""
        for m in self._modules:
            if has_hooks(m) and not all(_is_idle(hook) for hook in hooks_of(m)):
                return True
        return _global._has_any_global_hook() and any(
            not _is_idle(hook)
            for kind in (
                _global._global_forward_hooks,
                _global._global_forward_pre_hooks,
                _global._global_backward_hooks,
                _global._global_backward_pre_hooks,
            )
            for hook in kind.values()
        )

    def is_noisy(self) -> bool:
        """Return whether the original would drop values at random now."""
        return any(module.training and getattr(module, name) for module, name in self._noisy)


def _is_rate(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_idle(hook: object) -> bool:
    """Return whether a hook does not mind which modules compute.

    transformers' hooks wait for calls that ask for hidden states or attention weights, which the original serves
    anyway; the first such call leaves them behind for good. PyTorch's counter of operations asks where it is.
    """
    return getattr(hook, "__module__", "") in ("transformers.utils.output_capturing", "torch.utils.module_tracker")


class Accelerated:
    """The base of accelerated modules, before the original class in the order of method resolution."""

    _original_class: type
    _mixin: type

    def make_twin(self) -> Twin:
        """Return the twin of this module.

        Raises:
            Refusal: There is none.
        """
        raise NotImplementedError

    def serving_twin(self) -> Any:
        """Return the twin that serves a call, or None where the original code must."""
        twin = self.__dict__.get(_TWIN)
        if twin is None or torch.jit.is_tracing() or torch.compiler.is_exporting():
            return None
        if not twin.is_whole(self):
            if torch.compiler.is_compiling():
                return None
            twin = self._make_again()
        if twin is None or twin.is_observed() or twin.is_noisy():
            return None
        return twin.tower

    def _make_again(self) -> Twin | None:
        try:
            twin = self.make_twin()
        except Refusal as refusal:
            twin = None
            name = self._original_class.__name__
            warnings.warn(
                f"clipfast: a {name} was changed and runs its original code from now on: {refusal}",
                AccelerateWarning,
                stacklevel=4,
            )
        self.__dict__[_TWIN] = twin
        return twin

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # pickle finds classes by their name, where it would find the original one
        _, _, *rest = super().__reduce_ex__(protocol)
        return (_new, (self._original_class, self._mixin), *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != _TWIN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        try:
            self.__dict__[_TWIN] = self.make_twin()
        except Refusal:
            self.__dict__[_TWIN] = None

    def _replicate_for_data_parallel(self) -> nn.Module:
        # nn.DataParallel fills its replicas with tensors that are no Parameters of theirs
        replica = super()._replicate_for_data_parallel()
        replica.__dict__[_TWIN] = None
        return replica


_classes: dict[tuple[type, type], type] = {}


def accelerated_class(original: type, mixin: type) -> type:
    """Return the subclass of ``original`` that ``mixin`` accelerates, one for every pair."""
    if (original, mixin) not in _classes:
        namespace = {
            "__module__": original.__module__,
            "__qualname__": original.__qualname__,
            "__doc__": original.__doc__,
            "_original_class": original,
            "_mixin": mixin,
        }
        _classes[original, mixin] = types.new_class(
            original.__name__, (mixin, original), exec_body=lambda ns: ns.update(namespace)
        )
    return _classes[original, mixin]


def _new(original: type, mixin: type) -> nn.Module:
    cls = accelerated_class(original, mixin)
    return cls.__new__(cls)


def is_accelerated(module: nn.Module) -> bool:
    """Return whether a module is accelerated and has its twin."""
    return isinstance(module, Accelerated) and module.__dict__.get(_TWIN) is not None


def set_options(module: nn.Module, options: dict[str, Any]) -> None:
    """Change what an accelerated module has to know beside itself."""
    module.__dict__[_OPTIONS] = options


def put_on(module: nn.Module, mixin: type, options: dict[str, Any]) -> None:
    """Accelerate a module in place.

    Raises:
        Refusal: It has no twin; the module is as it was.
    """
    if isinstance(module, Accelerated):
        # changed since, and then its twin was given up
        set_options(module, options)
        module.__dict__[_TWIN] = module.make_twin()
        return
    original = module.__class__
    module.__class__ = accelerated_class(original, mixin)
    set_options(module, options)
    try:
        module.__dict__[_TWIN] = module.make_twin()
    except BaseException:
        module.__class__ = original
        del module.__dict__[_OPTIONS]
        raise


def take_off(modules: Iterable[nn.Module]) -> None:
    """Undo :func:`put_on` where it was done, in all ``modules`` or in none.

    Raises:
        ValueError: Another library made a subclass of an accelerated class since.
    """
    accelerated = [module for module in modules if isinstance(module, Accelerated)]
    for module in accelerated:
        cls = type(module)
        if cls is not accelerated_class(cls._original_class, cls._mixin):
            raise ValueError(
                f"restore(model): got a {cls.__name__} that was wrapped after clipfast.accelerate, expected the model "
                f"as accelerate left it; restore before wrapping"
            )
    for module in accelerated:
        for name in (_TWIN, _OPTIONS):
            module.__dict__.pop(name, None)
        module.__class__ = type(module)._original_class
