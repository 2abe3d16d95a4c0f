"""Whether modules compute what their classes say.

Whoever computes in the place of modules (packed weights, the twins of :mod:`clipfast.models.twins`) judges once whether
that is right: :func:`departure` looks for methods set on instances, methods and functions of a library that somebody
replaced, and weights that are no plain tensors. A :class:`~clipfast.modules.watch.Watch` tells later whether the
judgement still holds.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _global

# how a call of a module gets to its forward
_CALL = ("__call__", "_wrapped_call_impl", "_call_impl", "__getattr__", "__getattribute__", "forward")
_COMPILED = "_compiled_call_impl"

Reference = tuple[Any, str, Any]


def departure(module: nn.Module, sharded: bool = False) -> str | None:
    """Return how a module differs from what its class says, or None: methods and weights, not hooks.

    Args:
        module: The module.
        sharded: Whether weights may be FSDP2's, which are gathered before the module computes.
    """
    cls = type(module)
    for name in module.__dict__:
        if is_shadowed(module, name):
            return f"its {name} was set on the instance"
    if "parametrizations" in module._modules:
        return "it is parametrised"
    for name, parameter in module._parameters.items():
        if sharded and type(parameter).__name__ == "DTensor":
            continue
        if parameter is not None and type(parameter) not in (nn.Parameter, Tensor):
            return f"its {name} is a {type(parameter).__module__}.{type(parameter).__qualname__}, no plain Parameter"
    return replaced_function(references(cls))


def is_shadowed(module: nn.Module, name: str) -> bool:
    """Return whether an instance has something else in the place of a method of its class.

    What others put there and took back, such as offloading, is the class's own method, bound.
    """
    if name not in module.__dict__ or (hasattr(nn.Module, name) and name not in (*_CALL, _COMPILED)):
        return False  # or it moves, saves or prints modules
    found, method = getattr(type(module), name, None), module.__dict__[name]
    if getattr(method, "__self__", None) is module and getattr(method, "__func__", None) is found:
        return False
    return isinstance(found, types.FunctionType | property) or name == _COMPILED


def references(cls: type, entries: Iterable[str] = _CALL) -> list[Reference]:
    """Return every method and function that a class's code names, transitively, as (owner, name, value).

    Methods are followed wherever the class got them from, functions into the class's own file and ``torch.nn``.
    """
    found: dict[tuple[int, str], Reference] = {}
    homes = {_file_of(k) for k in cls.__mro__ if k not in (nn.Module, object)}
    pending = [(cls, name) for name in entries]
    while pending:
        owner, name = pending.pop()
        if (id(owner), name) in found:
            continue
        value = getattr(owner, name)
        found[id(owner), name] = (owner, name, value)
        for layer in _layers(value):
            code = getattr(layer, "__code__", None)
            if code is None or (code.co_filename not in homes and not code.co_filename.startswith(_TORCH_NN)):
                continue
            if isinstance(owner, type) and _definer(owner, name) in (nn.Module, object):
                continue
            pending += _named_by(code, layer.__globals__, owner if isinstance(owner, type) else None)
    return list(found.values())


def mentioned(cls: type) -> frozenset[str]:
    """Return every name and string in the code of a class's own methods: what they may read of an instance."""
    return _mentioned(cls, tuple(len(k.__dict__) for k in cls.__mro__))


@lru_cache(maxsize=512)
def _mentioned(cls: type, sizes: tuple[int, ...]) -> frozenset[str]:
    names: set[str] = set()
    for k in cls.__mro__:
        if k in (nn.Module, object):
            continue
        for value in k.__dict__.values():
            for layer in _layers(value):
                if hasattr(layer, "__code__"):
                    names |= _names(layer.__code__, strings=True)
    return frozenset(names)


def replaced_function(found: Iterable[Reference]) -> str | None:
    """Return which of some methods and functions is not its library's own, or None.

    A library's own lies in the library's folder, or in PyTorch's, in every layer of its decorators: whoever replaced
    one before we first looked is found out too.
    """
    for owner, name, value in found:
        if _is_foreign(owner, name, value):
            kind = f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__
            return f"{kind}.{name} was replaced"
    return None


def is_from(function: Any, package: str) -> bool:
    """Return whether a function, and each of its decorators, lies in a package's folder or in PyTorch's."""
    codes = (getattr(layer, "__code__", None) for layer in _layers(function))
    return all(code is None or code.co_filename.startswith((_TORCH, _folder(package))) for code in codes)


def _is_foreign(owner: Any, name: str, value: Any) -> bool:
    layers = _layers(value)
    defined_in = _definer(owner, name) if isinstance(owner, type) else owner
    folders = (_TORCH, _folder_of(defined_in))
    for layer in layers:
        code = getattr(layer, "__code__", None)
        if code is not None and not code.co_filename.startswith(folders):
            return True
    last = layers[-1] if layers else value
    if not isinstance(owner, type):
        # PyTorch's files import some under a name with an underscore before it
        known = getattr(last, "__name__", name).lstrip("_")
        return known != name.lstrip("_") and not name.startswith("has_torch_function")
    if defined_in in (nn.Module, object):
        return False  # Module.__call__ is _wrapped_call_impl by another name
    return getattr(last, "__qualname__", None) != f"{defined_in.__qualname__}.{name}"


def _layers(value: Any) -> list[Any]:
    """Return the functions that a method is made of, from the outermost decorator to the function itself."""
    value = getattr(value, "__func__", value)  # static and class methods
    value = value.fget if isinstance(value, property) else value
    layers = [value]
    while (inner := getattr(layers[-1], "__wrapped__", None)) is not None and len(layers) < 20:
        layers.append(inner)
    return layers


def _named_by(code: types.CodeType, scope: dict[str, Any], cls: type | None) -> Iterator[tuple[Any, str]]:
    names = _names(code)
    for name in names:
        if hasattr(nn.Module, name):
            continue  # a tensor's method of that name, or what moves and saves modules
        if cls is not None and _definer(cls, name) is not None:
            if isinstance(inspect.getattr_static(cls, name), types.FunctionType | property | staticmethod):
                yield cls, name
            continue
        value = scope.get(name)
        if isinstance(value, types.ModuleType):
            for inner in names:
                function = value.__dict__.get(inner)
                if callable(function) and not isinstance(function, type):
                    yield value, inner
        elif isinstance(value, types.FunctionType | types.BuiltinFunctionType):
            module = sys.modules.get(scope.get("__name__", ""))
            if module is not None and module.__dict__ is scope:
                yield module, name


def _names(code: types.CodeType, strings: bool = False) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant, strings)
        elif strings and isinstance(constant, str):
            names.add(constant)
    return names


def _definer(cls: type, name: str) -> type | None:
    return next((k for k in cls.__mro__ if name in k.__dict__), None)


def _file_of(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


@lru_cache(maxsize=512)
def _folder(package: str) -> str:
    file = getattr(sys.modules.get(package), "__file__", None)
    return os.path.dirname(file) + os.sep if file else "\0"


def _folder_of(owner: Any) -> str:
    name = owner.__module__ if isinstance(owner, type) else owner.__name__
    return _folder(name.partition(".")[0])


_TORCH = _folder("torch")
_TORCH_NN = _TORCH + "nn" + os.sep


def is_watched_globally() -> bool:
    """Return whether a hook waits for all modules of the process."""
    return _global._has_any_global_hook()


def is_untouched(module: nn.Module, forwards: dict[type, Any]) -> bool:
    """Return whether nobody would notice that what a module computes is computed without calling it.

    Modules that were hooked, patched, wrapped, parametrised, quantised or adapted since they were made are called.

    Args:
        module: The module.
        forwards: The kinds of module that are known, and their ``forward`` as it was first.
    """
    cls = type(module)
    return (
        cls in forwards
        and isinstance(module.forward, types.MethodType)  # a compiler looks at no more than this
        and (torch.compiler.is_compiling() or not (is_shadowed(module, "forward") or _is_call_changed(module)))
        and cls.forward is forwards[cls]
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )


def _is_call_changed(module: nn.Module) -> bool:
    """Return whether a call of a module does more than its forward and its own hooks, or another thing."""
    return (
        type(module).__call__ is not _MODULE_CALL  # torch.fx replaces it, and others that look on
        or module._compiled_call_impl is not None
        or _global._has_any_global_hook()
    )


# as it is before anybody replaces it
_MODULE_CALL = nn.Module.__call__


def _pristine(*classes: type) -> dict[type, Any]:
    return {cls: cls.forward for cls in classes if replaced_function(references(cls)) is None}


# nn.MultiheadAttention's output projection is a Linear under another name
LINEARS = _pristine(nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)
CONVOLUTIONS = _pristine(nn.Conv2d)
EMBEDDINGS = _pristine(nn.Embedding)


def is_transformed() -> bool:
    """Return whether ``torch.func``, forward-mode differentiation, ``torch.fx`` or a mode of the user's is at work."""
    return (
        torch._C._functorch.maybe_current_level() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.fx._symbolic_trace.is_fx_symbolic_tracing()
        or (torch._C._len_torch_function_stack() > 0 and not _all_of_pytorch(_function_modes()))
        or (torch._C._len_torch_dispatch_stack() > 0 and not _all_of_pytorch(_dispatch_modes()))
    )


def _function_modes() -> list[object]:
    return torch.overrides._get_current_function_mode_stack()


def _dispatch_modes() -> list[object]:
    return torch.utils._python_dispatch._get_current_dispatch_mode_stack()


def _all_of_pytorch(modes: Iterable[object]) -> bool:
    return all(type(mode).__module__.partition(".")[0] == "torch" for mode in modes)
