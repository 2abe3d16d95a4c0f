"""Ctrl-C as a request to finish, not as an accident."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether the user asked for the end."""

    requested: bool = False


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turn the first SIGINT (Ctrl-C) inside into ``requested = True``; a second one raises KeyboardInterrupt.

    SIGTERM, by which schedulers of clusters announce the end, does the same; a second one ends the process.

    A KeyboardInterrupt can strike between the updates of two parameters; a flag is read between two steps. Outside
    the main thread, where Python handles no signals, nothing changes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}

    def request(signum: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signum, defaults[signal.Signals(signum)])

    previous = {signum: signal.signal(signum, request) for signum in defaults}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            # None: installed by something else than Python, which cannot put it back
            signal.signal(signum, handler if handler is not None else defaults[signum])
