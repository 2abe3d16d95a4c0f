"""Measures a row: checks every side, then its memory, then times all sides in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipfast.benchmark.exactness import Errors, allowed, complaint, errors
from clipfast.benchmark.memory import peak_bytes, saved_bytes
from clipfast.benchmark.results import OURS, Row, Side
from clipfast.benchmark.timing import Clock, Inputs, Interleaved

Call = Callable[..., object]
_RIVALS_MAY = 8.0  # a rival is timed with more rounding than we allow ourselves; its error stands beside its time


class WrongResult(AssertionError):
    """A side of clipfast is further from the oracle than allowed; nothing was timed."""


@dataclass(frozen=True)
class Oracle:
    """The exact results of the first set of inputs.

    Attributes:
        results: Float64 tensors, as the sides return them.
        reference: The side whose error is the measure for the others; a name among the sides.
        scales: The natural scale of each result; max|result| by default.
        factor: Times the rule's bound, for results that are deep (a whole tower in bfloat16).
    """

    results: Sequence[Tensor]
    reference: str
    scales: Sequence[float] | None = None
    factor: float = 1.0


class Measurement:
    """A row that is being measured.

    Made, it has checked the sides and measured their memory; every :meth:`round` times all of them; :meth:`row` gives
    what was found.

    Args:
        row: What is measured, without sides.
        sides: Calls by name, ours first; for one that is absent, the reason in words. A side is called with a set of
            inputs and returns a tensor, several, or something else where there is no oracle.
        inputs: Sets of arguments that are taken in turn, more of them than a cache holds; one for calls of their own.
        oracle: What the sides must return; None where the benchmark compares results by itself.
        device: ``"cuda"`` or ``"cpu"``.
        saves: Whether sides build an autograd graph, whose kept memory is then measured.

    Raises:
        WrongResult: A side of clipfast is not right.
    """

    def __init__(
        self,
        row: Row,
        sides: dict[str, Call | str],
        inputs: Inputs = ((),),
        *,
        oracle: Oracle | None = None,
        device: str,
        saves: bool = False,
    ) -> None:
        self._row = row
        self._missing = {name: side for name, side in sides.items() if isinstance(side, str)}
        present = {name: side for name, side in sides.items() if not isinstance(side, str)}
        self._errors = self._check(present, inputs[0], oracle)
        present = {name: side for name, side in present.items() if name not in self._missing}
        clock = Clock(device)
        self._memory: dict[str, tuple[int | None, int | None]] = {}
        for name, side in present.items():
            first = inputs[0]  # which the check has called it with; a second set warms up what comes after the first
            for arguments in inputs[1:2]:
                side(*arguments)
            peak = peak_bytes(lambda side=side, first=first: side(*first), device)
            kept = saved_bytes(lambda side=side, first=first: side(*first)) if saves else None
            self._memory[name] = (peak, kept)
        self._timed = Interleaved(clock, present, inputs)

    def _check(self, sides: dict[str, Call], arguments: tuple, oracle: Oracle | None) -> dict[str, Errors]:
        found: dict[str, Errors] = {}
        for name, side in sides.items():
            try:
                results = side(*arguments)
                if oracle is not None:
                    found[name] = errors(_tensors(results), oracle.results, oracle.scales)
            except Exception as error:
                if name.startswith(OURS):
                    raise
                self._missing[name] = f"failed: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            results = None
        gc.collect()
        if oracle is None:
            return found
        if oracle.reference not in found:
            raise ValueError(f"oracle.reference: got {oracle.reference!r}, expected one of {', '.join(found)}")
        dtype = getattr(torch, self._row.dtype)
        for name, error in found.items():
            ours = name.startswith(OURS)
            most = allowed(found[oracle.reference], dtype, oracle.factor * (1.0 if ours else _RIVALS_MAY))
            problem = complaint(error, most)
            if problem and ours:
                raise WrongResult(f"{self._row.name}: {name} is {problem}")
            if problem:
                self._missing[name] = problem
        return found

    def rounds(self, seconds: float, least: int, most: int) -> int:
        """Return how many rounds of all sides fit into so many seconds."""
        return max(least, min(most, int(seconds / self._timed.round_s)))

    def round(self) -> float:
        """Time one round of every side; return the seconds of a call of the first."""
        self._timed.round()
        return next(iter(self._timed.device_s.values()))[-1]

    def row(self) -> Row:
        """Return the row with what was found."""
        sides = {
            name: Side(
                self._timed.device_s[name],
                self._timed.host_s[name],
                *self._memory[name],
                self._errors[name].largest if name in self._errors else None,
            )
            for name in self._timed.sides
        }
        return replace(self._row, sides=sides, missing=dict(self._missing))


def _tensors(results: object) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)
