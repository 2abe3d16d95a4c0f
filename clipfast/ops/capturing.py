"""While a CUDA graph is captured, nothing is compiled and nothing is loaded: either would end the capture."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from clipfast.ops.fallback import NotReady

_rehearsed: ContextVar[bool] = ContextVar("clipfast_rehearsed", default=False)


@contextmanager
def rehearsal() -> Iterator[None]:
    """Let towers compute inside a ``with`` block as they would under capture: no value is read from a tensor.

    What they launch then is what a capture will launch, and can be compiled, loaded and checked before it.
    """
    token = _rehearsed.set(True)
    try:
        yield
    finally:
        _rehearsed.reset(token)


def is_rehearsed() -> bool:
    """Return whether a capture is rehearsed."""
    return _rehearsed.get()


@functools.cache
def forbid_compilation() -> None:
    """Raise :class:`NotReady` where one of clipfast's kernels would be compiled under capture.

    Triton asks this hook when it does not find a kernel among those of the process, that is, before it compiles one or
    loads it from its cache on disk. A launch of what is there never comes here.
    """
    from triton import knobs

    others: Any = knobs.runtime.jit_cache_hook

    def ask(*arguments: Any, **named: Any) -> Any:
        if _is_ours(named.get("fn")) and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise NotReady(
                "a CUDA graph was captured before this kernel had run on these sizes; "
                "call clipfast.warm_up before the capture"
            )
        return others(*arguments, **named) if others is not None else None

    knobs.runtime.jit_cache_hook = ask


def _is_ours(function: Any) -> bool:
    return str(getattr(function, "module", "")).startswith("clipfast.kernels")
