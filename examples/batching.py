"""Batching of what waits: one thread computes, and takes at once what came while it was busy.

Work that finds the thread idle is computed at once, alone: nothing waits for company. Under load, all that waits is the
next batch, up to a limit, so that batches grow with the load by themselves. ``serve.py`` puts this behind HTTP.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

_RECENT = 2048  # items whose times the percentiles are of
_log = logging.getLogger(__name__)


class Refused(RuntimeError):
    """The queue is full or closed. Nothing of the work was taken."""


class Failed(RuntimeError):
    """The work could not be computed; ``__cause__`` says why."""


@dataclass(eq=False)
class _Job:
    """What one call of ``submit`` asked for."""

    results: dict[str, list[Any]]
    missing: int
    future: Future[dict[str, list[Any]]] = field(default_factory=Future)

    def deliver(self, item: _Item, result: Any) -> None:
        self.results[item.kind][item.place] = result
        self.missing -= 1
        # the second half is False where it was cancelled
        if not self.missing and self.future.set_running_or_notify_cancel():
            self.future.set_result(self.results)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            failure = Failed(f"{type(error).__name__}: {error}")
            failure.__cause__ = error
            self.future.set_exception(failure)


@dataclass(eq=False)
class _Item:
    job: _Job
    kind: str
    place: int
    value: Any
    since: float


@dataclass(eq=False)
class _Lane:
    """What waits for one function, and how long others took."""

    compute: Callable[[list[Any]], Sequence[Any]]
    waiting: deque[_Item] = field(default_factory=deque)
    items: int = 0
    batches: int = 0
    busy: float = 0.0
    recent: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT))  # queue, compute: seconds


class Batcher:
    """A thread that computes batches of what waits; use it in a ``with`` block.

    Each kind of work has its own batches. The kind whose first item has waited the longest is next.

    Args:
        compute: For each kind, a function of a list of items that returns as many results, in their order. Only the
            thread calls it. Where a batch fails, each of its items is computed alone, so that one does not fail others.
        max_batch: The most items in a call.
        max_waiting: The most items that wait.

    Raises:
        ValueError: A limit is below 1.
    """

    def __init__(
        self,
        compute: Mapping[str, Callable[[list[Any]], Sequence[Any]]],
        max_batch: int = 32,
        max_waiting: int = 256,
    ) -> None:
        if max_batch < 1 or max_waiting < 1:
            raise ValueError(f"max_batch, max_waiting: got {max_batch} and {max_waiting}, expected at least 1")
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self._lanes = {kind: _Lane(function) for kind, function in compute.items()}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, **work: Sequence[Any]) -> Future[dict[str, list[Any]]]:
        """Put items of one or several kinds into the queue, all or none; to be called from any thread.

        Args:
            **work: For each kind, a list of items.

        Returns:
            A future of the results, lists of the same kinds and lengths. It raises :class:`Failed` where an item
            failed. Once it is cancelled, what still waits of it is not computed.

        Raises:
            Refused: The queue is full or closed.
            ValueError: There is no item, there are more than will ever be taken, or the kind is unknown.
        """
        if not work.keys() <= self._lanes.keys() or not any(work.values()):
            raise ValueError(f"work: got {', '.join(work) or 'nothing'}, expected items of {', '.join(self._lanes)}")
        count = sum(map(len, work.values()))
        if count > self.max_waiting:
            raise ValueError(f"work: got {count} items, expected at most {self.max_waiting}, which the queue holds")
        job = _Job({kind: [None] * len(items) for kind, items in work.items()}, count)
        now = time.perf_counter()
        with self._changed:
            if self._closed:
                raise Refused("the server is shutting down")
            if self._count_waiting() + count > self.max_waiting:
                self._forget_cancelled()
            if (waiting := self._count_waiting()) + count > self.max_waiting:
                raise Refused(f"the queue is full: {waiting} of {self.max_waiting} wait, and {count} more came")
            for kind, items in work.items():
                self._lanes[kind].waiting.extend(_Item(job, kind, *it, now) for it in enumerate(items))
            self._changed.notify()
        return job.future

    def seconds_to_wait(self) -> int:
        """Return how long what waits now will take, as the past tells; at least a second."""
        with self._changed:
            lanes = list(self._lanes.values())
            return max(1, math.ceil(sum(len(lane.waiting) * lane.busy / max(lane.items, 1) for lane in lanes)))

    def stats(self) -> dict[str, Any]:
        """Return counts, and percentiles in milliseconds of the last items' time in the queue and in their batch."""
        with self._changed:
            waiting = self._count_waiting()
            lanes = {kind: (lane.items, lane.batches, list(lane.recent)) for kind, lane in self._lanes.items()}
        return {"waiting": waiting, "max_batch": self.max_batch, "max_waiting": self.max_waiting} | {
            kind: {
                "items": items,
                "batches": batches,
                "mean_batch": items / batches if batches else None,
                "queue_ms": percentiles(queue for queue, _ in recent),
                "compute_ms": percentiles(compute for _, compute in recent),
            }
            for kind, (items, batches, recent) in lanes.items()
        }

    def close(self) -> None:
        """Refuse what comes from now on, compute what waits, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- with the lock held ---

    def _count_waiting(self) -> int:
        return sum(len(lane.waiting) for lane in self._lanes.values())

    def _forget_cancelled(self) -> None:
        for lane in self._lanes.values():
            lane.waiting = deque(item for item in lane.waiting if not item.job.future.done())

    # --- the thread's own ---

    def _run(self) -> None:
        while lane := self._next_lane():
            self._compute(lane, self._take(lane))

    def _next_lane(self) -> _Lane | None:
        """Wait for work; None once there is none and will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._count_waiting())
            lanes = [lane for lane in self._lanes.values() if lane.waiting]
            return min(lanes, key=lambda lane: lane.waiting[0].since, default=None)

    def _take(self, lane: _Lane) -> list[_Item]:
        """Take what waits, without what nobody waits for any more."""
        batch: list[_Item] = []
        with self._changed:
            while lane.waiting and len(batch) < self.max_batch:
                item = lane.waiting.popleft()
                if not item.job.future.done():
                    batch.append(item)
        return batch

    def _compute(self, lane: _Lane, batch: list[_Item]) -> None:
        batch = [item for item in batch if not item.job.future.done()]
        if not batch:
            return
        began = time.perf_counter()
        failure: BaseException | None = None
        try:
            results = lane.compute([item.value for item in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"compute: got {len(results)} results, expected {len(batch)}")
        except BaseException as error:  # SystemExit too: the thread lives on
            failure = error
        if failure is None:
            self._count(lane, batch, began)
            for item, result in zip(batch, results, strict=True):
                item.job.deliver(item, result)
        elif len(batch) == 1:
            _log.error("an item failed", exc_info=failure)
            batch[0].job.fail(failure)
        else:
            del failure  # and what its frames hold, such as a card's memory
            for item in batch:
                self._compute(lane, [item])

    def _count(self, lane: _Lane, batch: list[_Item], began: float) -> None:
        took = time.perf_counter() - began
        with self._changed:
            lane.items += len(batch)
            lane.batches += 1
            lane.busy += took
            lane.recent.extend((began - item.since, took) for item in batch)


def percentiles(seconds: Iterable[float]) -> dict[str, float | None]:
    """Return the 50th, 95th and 99th percentile by nearest rank, in milliseconds; None of nothing."""
    ordered = sorted(seconds)
    return {
        f"p{p}": round(1e3 * ordered[math.ceil(p / 100 * len(ordered)) - 1], 3) if ordered else None
        for p in (50, 95, 99)
    }
