"""Clocks: how long a call takes the device, and how long Python waits for it.

Launches on a GPU are asynchronous: a host clock times them alone, and events under some 100 µs apart time the host.
A round therefore holds many calls, which the host queues while the device is kept busy; where even so the launches are
what takes the time, a CUDA graph replays the round. On a CPU both clocks are wall time, by the same code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

ROUND_S = {"cuda": 2e-3, "cpu": 1e-2}
"""The least that a round lasts, in seconds."""
_CALLS = 1000  # a round's most: no device queues more launches than this without waiting
_BUSY_CYCLES = 2_000_000  # about a millisecond: the device waits while the host queues

Inputs = Sequence[tuple[Any, ...]]


class Clock:
    """Times rounds of calls on one device.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
    """

    def __init__(self, device: str) -> None:
        if device not in ROUND_S:
            raise ValueError(f"Clock(device): got {device!r}, expected 'cuda' or 'cpu'")
        self.device = device

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def round(self, call: Callable[..., object], inputs: Inputs, calls: int) -> tuple[float, float]:
        """Return the seconds of one call on the device, and until it returned to Python, over a round of calls.

        Args:
            call: What is timed.
            inputs: Sets of arguments, taken in turn.
            calls: How many calls.
        """
        if self.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(_BUSY_CYCLES)
            start.record()
        began = time.perf_counter()
        for i in range(calls):
            call(*inputs[i % len(inputs)])
        host = (time.perf_counter() - began) / calls
        if self.device == "cpu":
            return host, host
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / calls, host

    def calls_a_round(self, call: Callable[..., object], inputs: Inputs) -> tuple[int, float]:
        """Return how many calls make a round long enough, and about what one takes; the call has been warmed up."""
        seconds, _ = self.round(call, inputs, 1)
        if seconds * 3 < ROUND_S[self.device]:
            seconds, _ = self.round(call, inputs, 3)
        return min(_CALLS, max(1, round(ROUND_S[self.device] / max(seconds, 1e-9)))), seconds

    def replayed(self, call: Callable[..., object], inputs: Inputs, calls: int) -> Callable[[], object] | None:
        """Return a function that replays a round as a CUDA graph, or None where the call cannot be captured.

        For launches that take the host longer than the device.
        """
        if self.device != "cuda":
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                for i in range(calls):
                    call(*inputs[i % len(inputs)])
            graph.replay()
            torch.cuda.synchronize()
        except RuntimeError:  # what it does cannot be captured: a copy from the host, a synchronisation
            return None
        return graph.replay


class Interleaved:
    """Sides that are timed in turn, a round of each after the other.

    Every one goes first as often as the others, and comes before its neighbour as often as behind it: a side finds the
    caches, the clock and the waiting threads as the one before it left them.

    Args:
        clock: The clock.
        sides: Calls by name, warmed up.
        inputs: Their arguments.
    """

    def __init__(self, clock: Clock, sides: dict[str, Callable[..., object]], inputs: Inputs) -> None:
        self.clock, self.sides, self.inputs = clock, sides, inputs
        self.device_s: dict[str, list[float]] = {name: [] for name in sides}
        self.host_s: dict[str, list[float]] = {name: [] for name in sides}
        tried = {name: clock.calls_a_round(call, inputs) for name, call in sides.items()}
        self.calls = {name: calls for name, (calls, _) in tried.items()}
        self.round_s = sum(calls * seconds for calls, seconds in tried.values())
        """About what a round of all sides takes."""
        self._graphs: dict[str, Callable[[], object]] = {}
        for name, call in sides.items() if clock.device == "cuda" else ():
            device, host = clock.round(call, inputs, self.calls[name])
            if host > 0.5 * device and (graph := clock.replayed(call, inputs, self.calls[name])) is not None:
                self._graphs[name] = graph

    def round(self) -> None:
        """Time one round of every side."""
        names = list(self.sides)
        turns, backwards = divmod(len(self.device_s[names[0]]), 2)
        turn = turns % len(names)
        order = names[turn:] + names[:turn]
        for name in reversed(order) if backwards else order:
            device, host = self.clock.round(self.sides[name], self.inputs, self.calls[name])
            if name in self._graphs:
                device = self.clock.round(self._graphs[name], [()], 1)[0] / self.calls[name]
            self.device_s[name].append(device)
            self.host_s[name].append(host)
