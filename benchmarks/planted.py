"""A pytest plugin that spoils clipfast's side of every row, to see that it is noticed.

PYTHONPATH=benchmarks pytest -p planted benchmarks/test_attention.py

CLIPFAST_PLANTED=slow makes calls take a fifth longer on the CPU; CLIPFAST_PLANTED=wrong makes results 1% too large.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from clipfast.benchmark.measure import Measurement
from clipfast.benchmark.results import OURS

SHARE = 0.2


def slow(call: Callable[..., object]) -> Callable[..., object]:
    def slower(*arguments: object) -> object:
        began = time.perf_counter()
        result = call(*arguments)
        end = began + (time.perf_counter() - began) * (1 + SHARE)
        while time.perf_counter() < end:
            pass
        return result

    return slower


def wrong(call: Callable[..., object]) -> Callable[..., object]:
    def larger(*arguments: object) -> object:
        result = call(*arguments)
        return result * 1.01 if isinstance(result, torch.Tensor) else [t * 1.01 for t in result]

    return larger


def pytest_configure(config: object) -> None:
    spoil = {"slow": slow, "wrong": wrong}[os.environ["CLIPFAST_PLANTED"]]
    made = Measurement.__init__

    def spoilt(self: Measurement, row: object, sides: dict, *arguments: object, **options: object) -> None:
        made(self, row, sides | {OURS: spoil(sides[OURS])}, *arguments, **options)

    Measurement.__init__ = spoilt
