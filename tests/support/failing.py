"""Kernels that fail as they may on a card that nobody has tried, and the state that such failures leave."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from clipfast.ops import fallback, kernel_ops, trust


class Failing:
    """Takes the place of a Triton kernel: it is asked for a grid, then launched, and raises."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.launches = error, 0

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> None:
            self.launches += 1
            raise self.error

        return launch


def let_fail(monkeypatch: pytest.MonkeyPatch, kernel: str, error: BaseException) -> Failing:
    """Let a kernel, such as ``layer_norm._forward_kernel``, raise an error whenever it is launched."""
    family, name = kernel.split(".")
    failing = Failing(error)
    monkeypatch.setattr(importlib.import_module(f"clipfast.kernels.{family}"), name, failing)
    return failing


@pytest.fixture
def fresh_failures() -> Iterator[None]:
    """Forget failures and checks before a test and after it."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    fallback.forget()
    trust.forget()
    kernel_ops.kernel.cache_clear()
