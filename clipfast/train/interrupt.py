"""Ctrl-C, and the signal by which a cluster's scheduler announces the end, as requests and not as accidents."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from clipfast.data.workers import STOP_SIGNALS, nothing

# seconds in which a second SIGTERM is the first one's echo: `timeout`, shells and schedulers send it to a process and
# to its group
_ECHO = 2.0


class Stopped(KeyboardInterrupt):
    """The end was asked for before the first step: there is nothing to save."""


@dataclass
class StopRequest:
    """Whether the user, or the scheduler, asked for the end.

    Attributes:
        requested: Whether they did.
        since: When, by ``time.monotonic``.
    """

    requested: bool = False
    since: float = 0.0
    _raises: bool = False

    def asked(self) -> bool:
        """Return ``requested``, as a function to hand on."""
        return self.requested

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Raise :class:`Stopped` at a request inside: for what may be left at any point, such as preparations."""
        before, self._raises = self._raises, True
        try:
            self._check()
            yield
            # one that was raised where nothing can pass an exception on, such as a weak reference's callback
            self._check()
        finally:
            self._raises = before

    def _check(self) -> None:
        if self.requested:
            raise Stopped

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
            if self._raises:
                raise Stopped
        elif _ends_at_once(signum, time.monotonic() - self.since):
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def _ends_at_once(signum: int, seconds: float) -> bool:
    """Whether a signal after the first one is another wish, and not an echo of it.

    Under ``torchrun`` it never is: ``torchrun`` passes on what a scheduler or a terminal may have sent to all processes
    already, and kills those that stay too long by itself.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return False
    return signum == signal.SIGINT or seconds > _ECHO


_current: StopRequest | None = None


@contextmanager
def stop_on_interrupt() -> Iterator[StopRequest]:
    """Turn the first SIGINT (Ctrl-C) or SIGTERM inside into ``requested = True``.

    A second one ends the process: SIGINT by a KeyboardInterrupt, SIGTERM by itself where it comes more than two seconds
    after the first. Under ``torchrun``, which repeats signals, those after the first do nothing.

    A KeyboardInterrupt can strike between the updates of two parameters; a flag is read between two steps. Inside
    another ``stop_on_interrupt`` the request is that one's. Outside the main thread, where Python handles no signals,
    nothing changes.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    if _current is not None:
        yield _current
        return
    _current = stop = StopRequest()
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    previous = {signum: signal.signal(signum, stop._receive) for signum in STOP_SIGNALS}
    try:
        yield stop
    finally:
        _current = None
        for signum in previous:
            signal.signal(signum, nothing)
        for signum, handler in previous.items():
            # None: installed by something else than Python, which cannot put it back
            signal.signal(signum, handler if handler is not None else defaults[signum])
