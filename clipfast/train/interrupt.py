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

    A KeyboardInterrupt can strike between the updates of two parameters; a flag is read between two steps. Outside
    the main thread, where Python handles no signals, nothing changes.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        # None: installed by something else than Python, which cannot put it back
        signal.signal(signal.SIGINT, previous if previous is not None else signal.default_int_handler)
