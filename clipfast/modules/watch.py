"""A cheap, certain test that modules are as they were when somebody judged what they compute.

It takes some ten microseconds for a block at every call. What it compares is everything that a module's code can read:
attributes, children, hooks, kinds of parameters, and each method and function that the code names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter
from typing import Any

from torch import nn

from clipfast.modules.plainness import Reference, mentioned, references

_CONSTANTS = (int, float, str, bytes, tuple, frozenset, type(None))
_dict_of = attrgetter("__dict__")
_kind_of = attrgetter("shape", "is_meta")


class Watch:
    """What modules are now, to be compared with what they are later.

    Args:
        modules: The modules; each is looked at by itself, so name those inside too.
        references: Methods and functions to watch beside those that the modules' classes name.
        more: Gives further values to compare.
    """

    def __init__(
        self, modules: Iterable[nn.Module], references_too: Iterable[Reference] = (), more: Callable[[], Any] = tuple
    ) -> None:
        self.modules = tuple(modules)
        self._types = list(map(type, self.modules))
        self._children = [m._modules for m in self.modules if m._modules]
        self._inside = list(chain.from_iterable(map(dict.values, self._children)))
        self._parameters = [m._parameters for m in self.modules if m._parameters]
        self._kinds = self._kinds_now()
        self._on_meta = any(p is not None and p.is_meta for table in self._parameters for p in table.values())
        self._hooks = tuple(chain.from_iterable(map(_hook_tables, self.modules)))
        found = {(id(o), n): (o, n, v) for o, n, v in references_too}
        for cls in dict.fromkeys(self._types):
            found.update({(id(o), n): (o, n, v) for o, n, v in references(cls)})
        self.references = list(found.values())
        self._owners, self._names, self._functions = (list(t) for t in zip(*self.references, strict=True))
        self._more, self._more_values = more, more()
        self._attributes = [dict(m.__dict__) for m in self.modules]
        # training and eval() are both remembered
        self._known = [list(chain.from_iterable(map(dict.values, map(_dict_of, self.modules))))]

    def holds(self) -> bool:
        """Return whether everything but hooks and the values of weights is as it was."""
        try:
            return (
                list(map(type, self.modules)) == self._types
                and list(map(getattr, self._owners, self._names)) == self._functions
                and self._same_attributes()
                and list(chain.from_iterable(map(dict.values, self._children))) == self._inside
                and self._kinds_now() == self._kinds
                and self._more() == self._more_values
            )
        except Exception:  # what cannot be compared is not the same
            return False

    def is_on_meta(self) -> bool:
        """Return whether a weight has no values, and the comparison holds."""
        return self._on_meta

    def is_hooked(self) -> bool:
        """Return whether a hook waits for one of the modules."""
        return any(self._hooks)

    def _kinds_now(self) -> list[Any]:
        parameters = list(chain.from_iterable(map(dict.values, self._parameters)))
        kinds: list[Any] = list(map(type, parameters))
        kinds += [_kind_of(p) for p in parameters if p is not None]
        return kinds

    def _same_attributes(self) -> bool:
        dicts = list(map(_dict_of, self.modules))
        # lists compare by identity first, so this is one pass over pointers
        now = list(chain.from_iterable(map(dict.values, dicts)))
        for known in self._known:
            if now == known:
                return True
        for module, before, after in zip(self.modules, self._attributes, dicts, strict=True):
            if not _same(type(module), before, after):
                return False
        self._known = [now, self._known[0]]
        return True


def _same(cls: type, before: dict[str, Any], after: dict[str, Any]) -> bool:
    missing = object()
    for name in {**before, **after}:
        a, b = before.get(name, missing), after.get(name, missing)
        if a is b or name == "training" or (type(a) is type(b) and isinstance(a, _CONSTANTS) and a == b):
            continue
        # what somebody notes on a module for himself changes nothing
        if hasattr(cls, name) or name in mentioned(cls) or name in _STANDARD:
            return False
    return True


_STANDARD = frozenset(nn.Module().__dict__)


def modules_in(*roots: nn.Module) -> dict[nn.Module, str]:
    """Return modules and all those inside them, each with its path; nothing of theirs is called.

    Some wrappers change themselves when they are asked for ``modules()``.
    """
    found: dict[nn.Module, str] = {}
    for root in roots:
        _add(root, "", found)
    return found


def _add(module: nn.Module, path: str, found: dict[nn.Module, str]) -> None:
    if module not in found:
        found[module] = path
        for name, child in module._modules.items():
            if child is not None:
                _add(child, f"{path}.{name}" if path else name, found)


def _hook_tables(module: nn.Module) -> tuple[dict, ...]:
    return (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
