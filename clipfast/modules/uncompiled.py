"""What ``torch.compile`` leaves to Python, without importing the compiler for it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P, T = ParamSpec("P"), TypeVar("T")


def uncompiled(reason: str, *, recursive: bool = True) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Do what ``torch.compiler.disable`` does, which imports the compiler, and that Triton, when a file is read.

    Args:
        reason: Why, for the error of ``fullgraph=True``.
        recursive: Whether what the function calls is left to Python too.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        disabled: list[Callable[P, T]] = []

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not disabled and "torch._dynamo" in sys.modules:
                disabled.append(torch.compiler.disable(function, recursive=recursive, reason=reason))
            return (disabled[0] if disabled else function)(*args, **kwargs)

        # what the compiler asks before it looks into a call
        call._torchdynamo_disable, call._torchdynamo_disable_msg = True, reason
        return call

    return decorate
