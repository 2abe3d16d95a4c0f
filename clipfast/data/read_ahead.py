"""Reading rows by threads while those before them are computed, never further ahead than asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from clipfast.data.pairs import PairError
from clipfast.data.transform import ImageError
from clipfast.settings import at_least, between, check_setting

T = TypeVar("T")

# what is wrong with one row and no other
UNREADABLE = (PairError, ImageError, OSError)


def read_ahead(
    read: Callable[[int], T], rows: Iterable[int], *, workers: int = 2, ahead: int = 64
) -> Iterator[tuple[int, T | Exception]]:
    """Yield ``(row, read(row))`` in order; at most ``ahead`` rows are read, or being read, and not yet taken.

    Threads do: Pillow decodes without Python's lock.

    Args:
        read: Reads one row; called by several threads at a time.
        rows: Their numbers.
        workers: How many threads; with 0, each row is read when it is asked for.
        ahead: The bound.

    Yields:
        The row's number, and what was read or why it cannot be (``PairError``, ``ImageError`` or ``OSError``). Any
        other exception is raised.

    Raises:
        ValueError: ``workers`` is negative, or ``ahead`` is not positive.
    """
    check_setting("workers", workers, int, between(0, 1000))
    check_setting("ahead", ahead, int, at_least(1))
    return _read_ahead(read, iter(rows), workers, ahead)


def _read_ahead(
    read: Callable[[int], T], rows: Iterator[int], workers: int, ahead: int
) -> Iterator[tuple[int, T | Exception]]:
    def try_to_read(row: int) -> T | Exception:
        try:
            return read(row)
        except UNREADABLE as error:
            return error

    if not workers:
        for row in rows:
            yield row, try_to_read(row)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="clipfast-read")
    try:
        waiting: deque[tuple[int, Future[T | Exception]]] = deque(
            (row, pool.submit(try_to_read, row)) for row in islice(rows, ahead)
        )
        while waiting:
            row, future = waiting.popleft()
            result = future.result()
            # the next is begun when this one is taken: while the taker computes, nothing more is read
            yield row, result
            waiting.extend((row, pool.submit(try_to_read, row)) for row in islice(rows, 1))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
