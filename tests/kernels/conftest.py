"""Kernels run on the GPU where there is one, else in Triton's interpreter; without Triton the folder is skipped."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import interpreter
import pytest

import clipfast

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    interpreter.prepare()


class _Skipped(pytest.Module):
    def collect(self) -> list[pytest.Item]:
        pytest.skip("Triton is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    """Leave no file of this folder imported where Triton is not installed."""
    return None if HAS_TRITON else _Skipped.from_parent(parent, path=module_path)


@pytest.fixture
def triton_backend() -> Iterator[None]:
    """Let ``clipfast.ops`` use the kernels wherever they serve a call."""
    with clipfast.backend("triton"):
        yield
