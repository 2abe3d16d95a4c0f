"""Outputs of transformers' models that compute fields of theirs when these are first read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transformers.utils import ModelOutput

Output = TypeVar("Output", bound=ModelOutput)

_LATER = "_clipfast_later"


class _Pending:
    """Stands in the dictionary of an output for what was not computed yet; nobody gets to see it."""


def lazy(output: Output, later: Mapping[str, Callable[[], Any]]) -> Output:
    """Let an output compute fields when they are first read, in whatever way.

    Args:
        output: Without them.
        later: What gives each of them, by the fields' names. Called once, unless it raises.

    Returns:
        ``output``. It is of a subclass of its class until all its fields are there, and then of its class. Reading one
        of them computes that; other fields are read as they are. Whatever else is done with the output (iterating over
        values, copying, comparing, pickling) computes all.
    """
    names = list(output.__dataclass_fields__)
    # in the dictionary's order
    made = type(output)(**{name: _Pending() if name in later else getattr(output, name) for name in names})
    for name in later:
        del made.__dict__[name]
    made.__dict__[_LATER] = dict(later)
    made.__class__ = _lazy_class(type(output))
    return made


def _pending(output: ModelOutput) -> dict[str, Callable[[], Any]]:
    return object.__getattribute__(output, "__dict__").get(_LATER, {})


def _put(output: ModelOutput, name: str, value: Any) -> None:
    """Give a field its value; an output whose fields are all there is of its original class again."""
    later = _pending(output)
    # where several threads read, the last one writes what the first wrote
    later.pop(name, None)
    if not later:
        object.__getattribute__(output, "__dict__").pop(_LATER, None)
        output.__class__ = next((c for c in type(output).__mro__ if not hasattr(c, "_clipfast_base")), type(output))
    ModelOutput.__setitem__(output, name, value)


def _settle(output: ModelOutput, *names: str) -> None:
    """Compute fields that wait; all, where none is named."""
    for name in names or tuple(_pending(output)):
        compute = _pending(output).get(name)
        if compute is not None:
            _put(output, name, compute())


def _after(name: str) -> Callable[..., Any]:
    """Return a method that settles its output and then does what that does."""

    def method(self: ModelOutput, *args: Any, **kwargs: Any) -> Any:
        _settle(self)
        return getattr(self, name)(*args, **kwargs)

    return method


@functools.cache
def _lazy_class(base: type[ModelOutput]) -> type[ModelOutput]:
    fields = frozenset(base.__dataclass_fields__)

    def new(cls: type, *args: Any, **kwargs: Any) -> ModelOutput:
        # libraries make outputs anew by type(output)(...)
        return base(*args, **kwargs)

    def get_attribute(self: ModelOutput, name: str) -> Any:
        hidden = name.startswith("__") and name != "__dict__"
        later = {} if hidden else _pending(self)
        if name in later:
            _settle(self, name)
        elif later and name not in fields and name != "keys":
            _settle(self)
        return object.__getattribute__(self, name)

    def get_item(self: ModelOutput, key: Any) -> Any:
        name = list(self.keys())[key] if isinstance(key, int) else key
        if isinstance(name, str) and name in fields and name in self.keys():
            return getattr(self, name)
        _settle(self)
        return self[key]

    def set_attribute(self: ModelOutput, name: str, value: Any) -> None:
        if name in _pending(self) and value is not None:
            _put(self, name, value)
            return
        # what is set to None stays in the dictionary as it was
        _settle(self, name)
        base.__setattr__(self, name, value)

    def set_item(self: ModelOutput, key: str, value: Any) -> None:
        _put(self, key, value)

    # what Python looks up in the class
    settled = ("__eq__", "__ne__", "__repr__", "__or__", "__ror__", "__ior__", "__reduce__", "__reduce_ex__")
    namespace = {
        "_clipfast_base": base,
        "__module__": base.__module__,
        "__new__": new,
        "__getattribute__": get_attribute,
        "__getitem__": get_item,
        "__setattr__": set_attribute,
        "__setitem__": set_item,
        "__hash__": base.__hash__,
        **{name: _after(name) for name in settled},
    }
    return type(f"Lazy{base.__name__}", (base,), namespace)
