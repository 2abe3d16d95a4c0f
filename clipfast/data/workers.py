"""Processes that read and decode, which nothing but their trainer ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

T = TypeVar("T")

# what a terminal and a scheduler of clusters ask for the end with
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# seconds between two looks at whether to stop, while a batch is waited for
WAIT = 0.1
# seconds in which workers may end what they are at, once nobody wants it any more
_PATIENCE = 0.5
# what PyTorch says when a batch is not there after the loader's `timeout`; the iterator can be asked again
_TIMED_OUT = "DataLoader timed out"


class StoppedReading(Exception):
    """The end was asked for while this process itself read a batch."""


class _Worker(SpawnProcess):
    """A worker that keeps SIGINT and SIGTERM blocked from its first instruction on: it inherits the mask.

    A terminal's Ctrl-C and most schedulers signal whole process groups. A worker that died of it would take the run
    with it before the trainer could save.
    """

    deadline: float | None = None

    def start(self) -> None:
        # the tracker's own start would unblock the signals (Python 3.11)
        resource_tracker.ensure_running()
        with _signals_blocked():
            super().start()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the end; with a timeout, which is how PyTorch closes a loader, see to it that it comes."""
        if timeout is None:
            super().join()
            return
        patience = _PATIENCE if self.deadline is None else self.deadline - time.monotonic()
        with _deaths_expected():
            super().join(max(0.0, min(timeout, patience)))
            if self.is_alive():
                self.kill()
                super().join(timeout)


class Workers(SpawnContext):
    """The ``multiprocessing_context`` of a loader whose workers only its own process ends.

    They are started anew and not forked: a fork of a process that has computed with OpenMP can wait forever, and a
    fork server would hand its mask of signals to all that the process starts later.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started: list[_Worker] = []

    def Process(self, *args: Any, **options: Any) -> _Worker:
        """Make a worker, by the name that multiprocessing has for it."""
        worker = _Worker(*args, **options)
        self._started.append(worker)
        return worker

    def hurry(self) -> None:
        """Give all workers together, and not one after the other, the moment in which they may end by themselves."""
        deadline = time.monotonic() + _PATIENCE
        for worker in self._started:
            worker.deadline = deadline


def ignore_stop_signals(_: int = 0) -> None:
    """Ignore SIGINT and SIGTERM in this process; a ``worker_init_fn``, which undoes PyTorch's handler of SIGTERM."""
    for handler in (nothing, signal.SIG_IGN):
        for number in STOP_SIGNALS:
            signal.signal(number, handler)


def nothing(signum: int, frame: FrameType | None) -> None:
    """Handle a signal that has come by doing nothing: where its handler is SIG_IGN by then, Python prints an error."""


def start_worker(_: int, begin: Callable[[], None]) -> None:
    """Begin a worker, as a ``worker_init_fn``: ignore the signals to stop, and do what :func:`for_workers` says."""
    ignore_stop_signals()
    begin()


def until_stopped(
    loader: DataLoader[T], workers: Workers | None, stop: Callable[[], bool] | None
) -> Generator[T, None, None]:
    """Start a loader, and yield its batches until there are no more or ``stop()`` is true.

    An exception in the place of a batch is raised.

    Args:
        loader: With ``timeout=WAIT`` if it has workers: a batch and the end are waited for at once.
        workers: Its ``multiprocessing_context``; None if this process reads itself.
        stop: Asked every :data:`WAIT` seconds while a batch is not there.
    """
    return _until_stopped(iter(loader), workers, stop)


def _until_stopped(
    batches: Iterator[T], workers: Workers | None, stop: Callable[[], bool] | None
) -> Generator[T, None, None]:
    try:
        while True:
            try:
                batch = next(batches)
            except (StopIteration, StoppedReading):
                return
            except RuntimeError as error:
                if not str(error).startswith(_TIMED_OUT):
                    raise
                if stop is not None and stop():
                    return
                continue
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        if workers is not None:
            workers.hurry()
        # PyTorch ends the workers when nobody holds their iterator; one with threads of its own may abort as it ends
        with _deaths_expected():
            del batches


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block the signals in this thread; those that come meanwhile are delivered afterwards."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, which has no process groups of this kind
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deaths_expected() -> Iterator[None]:
    """Keep PyTorch's handler of SIGCHLD out of it: a worker that is killed or aborts as it ends is no accident here."""
    number = getattr(signal, "SIGCHLD", None)
    handler = signal.getsignal(number) if number is not None else None
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(number, nothing)
    try:
        yield
    finally:
        signal.signal(number, handler)
