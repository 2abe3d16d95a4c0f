"""Packages that are called: ``clipfast.train(...)`` is what ``clipfast train`` does, and a package of modules."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class Room(ModuleType):
    """A package that does what its name says when it is called; see :func:`callable_as`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the package's function."""
        return self._function()(*args, **kwargs)

    def _function(self) -> Any:
        module, _, name = self.__dict__["_called"].partition(":")
        return getattr(importlib.import_module(module), name)

    @property
    def __wrapped__(self) -> Any:
        """The function, for :func:`inspect.signature`."""
        return self._function()


def callable_as(package: str, function: str) -> None:
    """Let a package be called.

    Args:
        package: Its ``__name__``.
        function: ``module:name`` of what is called then; it is imported at the first call.
    """
    module = sys.modules[package]
    module.__class__ = Room
    module.__dict__["_called"] = function
