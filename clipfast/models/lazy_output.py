"""Outputs of transformers' models that compute their tokens when these are first read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from transformers.utils import ModelOutput

Output = TypeVar("Output", bound=ModelOutput)

_LATER = "_clipfast_later"
_FIELD = "last_hidden_state"
# what may be asked for without computing
_KNOWN = frozenset({"pooler_output", "text_embeds", "hidden_states", "attentions", "keys"})


class _Pending:
    """Stands in the dictionary of an output for what was not computed yet; nobody gets to see it."""


def lazy(output: Output, tokens: Callable[[], Tensor]) -> Output:
    """Let an output compute its ``last_hidden_state`` when that is first read, in whatever way.

    Args:
        output: Without it, of a class whose first field it is, or the second.
        tokens: Gives it. Called once, unless it raises.

    Returns:
        ``output``. It is of a subclass of its class until its tokens are read, and then of its class: reading any
        other attribute than the pooled features, iterating over values, copying, comparing and pickling read them.
    """
    values = {name: getattr(output, name) for name in output.__dataclass_fields__}
    # in the dictionary's order
    made = type(output)(**{k: _Pending() if k == _FIELD else v for k, v in values.items()})
    del made.__dict__[_FIELD]
    made.__dict__[_LATER] = tokens
    made.__class__ = _lazy_class(type(output))
    return made


def _settle(output: ModelOutput, value: Any = None) -> None:
    """Make an output one of its original class, with its tokens computed, or with a value in their place."""
    state = object.__getattribute__(output, "__dict__")
    later = state.get(_LATER)
    if value is None and later is not None:
        value = later()
    state.pop(_LATER, None)
    # where several threads read, the last one writes what the first wrote
    output.__class__ = next((c for c in type(output).__mro__ if not hasattr(c, "_clipfast_base")), type(output))
    output[_FIELD] = value


def _after(name: str) -> Callable[..., Any]:
    """Return a method that settles its output and then does what that does."""

    def method(self: ModelOutput, *args: Any, **kwargs: Any) -> Any:
        _settle(self)
        return getattr(self, name)(*args, **kwargs)

    return method


@functools.cache
def _lazy_class(base: type[ModelOutput]) -> type[ModelOutput]:
    def new(cls: type, *args: Any, **kwargs: Any) -> ModelOutput:
        # libraries make outputs anew by type(output)(...)
        return base(*args, **kwargs)

    def get_attribute(self: ModelOutput, name: str) -> Any:
        hidden = name.startswith("__") and name != "__dict__"
        if name in _KNOWN or hidden or _LATER not in object.__getattribute__(self, "__dict__"):
            return object.__getattribute__(self, name)
        _settle(self)
        return getattr(self, name)

    def get_item(self: ModelOutput, key: Any) -> Any:
        name = list(self.keys())[key] if isinstance(key, int) else key
        if isinstance(name, str) and name in _KNOWN and name in self.keys():
            return getattr(self, name)
        _settle(self)
        return self[key]

    def set_attribute(self: ModelOutput, name: str, value: Any) -> None:
        if name == _FIELD and value is not None:
            _settle(self, value)
        elif name == _FIELD:
            _settle(self)
            self.last_hidden_state = value
        else:
            super(lazy_class, self).__setattr__(name, value)

    def set_item(self: ModelOutput, key: str, value: Any) -> None:
        if key == _FIELD:
            _settle(self, value)
        else:
            super(lazy_class, self).__setitem__(key, value)

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
    lazy_class = type(f"Lazy{base.__name__}", (base,), namespace)
    return lazy_class
