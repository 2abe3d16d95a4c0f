"""What a module that clipfast accelerates becomes: an instance of a subclass of its own class.

The subclass is made on the fly and keeps the class's name and module, since libraries tell classes apart by them
(configurations that are saved, wrapping policies, registries of outputs).
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from clipfast.models.twin_blocks import Refusal
from clipfast.models.twin_state import Refused, Twin
from clipfast.modules import plainness
from clipfast.modules.watch import modules_in

_TWIN = "_clipfast_twin"
_OPTIONS = "_clipfast_options"
# PyTorch's functions within clipfast's ops: who replaced one did not mean those
_CALLED = ("linear", "gelu", "layer_norm", "scaled_dot_product_attention", "softmax", "embedding")


class AccelerateWarning(UserWarning):
    """A part of a model is served by its original code."""


def _also_when_restored(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that somebody kept go on after the module was restored, by the class's own."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, Accelerated):
            return method(self, *args, **kwargs)
        return getattr(type(self), method.__name__)(self, *args, **kwargs)

    return call


class Accelerated:
    """The base of accelerated modules, before the original class in the order of method resolution.

    Attributes:
        replaced_methods: The methods of the library's class that the accelerated form computes in the place of.
        replaced_children: The children that it computes in the place of.
    """

    _original_class: type
    _mixin: type
    replaced_methods: tuple[str, ...] = ("forward",)
    replaced_children: tuple[str, ...] = ()
    # of those that the class itself makes, which have no twin until they are accelerated
    _clipfast_options: Mapping[str, Any] = types.MappingProxyType({"token_outputs": True})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in cls.replaced_methods:
            if name in cls.__dict__ and cls.__module__.partition(".")[0] == "clipfast":
                setattr(cls, name, _also_when_restored(cls.__dict__[name]))

    def make_twin(self) -> Twin:
        """Return the twin of this module.

        Raises:
            Refusal: There is none.
        """
        raise NotImplementedError

    def judged_twin(self) -> Twin:
        """Return :meth:`make_twin`'s, or refuse modules that were changed and what that cannot make sense of."""
        for name in self.replaced_children:
            child = self._modules.get(name)
            for module, path in modules_in(child).items() if child is not None else ():
                reason = plainness.departure(module)
                if reason is not None:
                    raise Refusal(f"{name}.{path}: {reason}" if path else f"{name}: {reason}")
        try:
            return self.make_twin()
        except Refusal:
            raise
        except Exception as error:
            raise Refusal(f"its parts are not known ({type(error).__name__}: {error})") from error

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return those attributes of the module itself that its twin was made by, to be compared later."""
        return ()

    def own_references(self) -> list[plainness.Reference]:
        """Return the methods and functions that the original's own code names, and those that clipfast's calls."""
        own = plainness.references(self._original_class, self.replaced_methods)
        return own + [(F, name, getattr(F, name)) for name in _CALLED]

    def changed_method(self, names: Iterable[str]) -> str | None:
        """Return which method was set on the instance, or None; what stands in ``forward``'s place calls on its own."""
        for name in names:
            if plainness.is_shadowed(self, name):
                return f"its {name} was set on the instance"
        return None

    def serving_twin(self) -> Any:
        """Return the twin that serves a call, or None where the original code must."""
        twin = self.__dict__.get(_TWIN)
        if twin is None or torch.jit.is_tracing() or torch.compiler.is_exporting():
            return None
        if torch.compiler.is_compiling():
            if twin.tower is None or not twin.is_whole_while_compiling(self):
                return None
        elif plainness.is_transformed():
            return None
        elif not twin.is_whole(self):
            twin = self._judge_again(twin)
        if twin.tower is None or twin.is_on_meta() or twin.observer() is not None or twin.noise() is not None:
            return None
        return twin.tower

    def why_not(self) -> str | None:
        """Return why the original code would serve a call now, or None where the twin would."""
        twin = self.__dict__.get(_TWIN)
        if twin is None:
            return "it was not accelerated, or was changed since"
        if not twin.is_whole(self):
            twin = self._judge_again(twin)
        return twin.refusal or twin.observer() or twin.noise()

    def _judge_again(self, last: Twin | Refused) -> Twin | Refused:
        twin: Twin | Refused
        try:
            twin = self.judged_twin()
        except Refusal as refusal:
            patience = last.next_patience() if isinstance(last, Refused) else 0
            twin = Refused(self, str(refusal), patience)
            if last.refusal != twin.refusal:
                name = self._original_class.__name__
                warnings.warn(
                    f"clipfast: a {name} was changed and runs its original code as long as it is: {refusal}",
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
        if _OPTIONS not in state:
            return  # an instance that was made anew by its class
        try:
            self.__dict__[_TWIN] = self.judged_twin()
        except Refusal as refusal:
            self.__dict__[_TWIN] = Refused(self, str(refusal))

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
    twin = module.__dict__.get(_TWIN) if isinstance(module, Accelerated) else None
    return twin is not None and twin.tower is not None


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
        module.__dict__[_TWIN] = module.judged_twin()
        return
    original = module.__class__
    module.__class__ = accelerated_class(original, mixin)
    set_options(module, options)
    try:
        module.__dict__[_TWIN] = module.judged_twin()
    except BaseException:
        module.__class__ = original
        del module.__dict__[_OPTIONS]
        raise


def refusal_of(module: nn.Module, mixin: type) -> str | None:
    """Return why a module that is not accelerated could not be now, or None; it is left as it is."""
    cls = accelerated_class(type(module), mixin)
    probe = cls.__new__(cls)
    object.__setattr__(probe, "__dict__", module.__dict__)
    try:
        probe.judged_twin()
    except Refusal as refusal:
        return str(refusal)
    return None


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
        for name, value in list(module.__dict__.items()):
            # what others put in a method's place and took back: the accelerated method, bound
            if isinstance(value, types.MethodType) and value.__func__ is getattr(type(module)._mixin, name, None):
                del module.__dict__[name]
        module.__class__ = type(module)._original_class
