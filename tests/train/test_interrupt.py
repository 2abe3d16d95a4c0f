from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from clipfast.train.interrupt import stop_on_interrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def handler() -> Iterator[Callable[..., None]]:
    """A handler of somebody else's, which must be back in the end."""
    before = signal.getsignal(signal.SIGINT)

    def own(signum: int, frame: object) -> None:
        raise AssertionError("the handler outside was called inside")

    signal.signal(signal.SIGINT, own)
    yield own
    signal.signal(signal.SIGINT, before)


def test_first_is_a_request_and_second_an_exception(handler):
    with stop_on_interrupt() as stop:
        assert not stop.requested
        press_ctrl_c()
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


@pytest.mark.parametrize("presses", [0, 1])
def test_the_handler_outside_returns(handler, presses):
    with stop_on_interrupt():
        for _ in range(presses):
            press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is handler


def test_outside_the_main_thread_nothing_is_installed():
    seen = []

    def run() -> None:
        with stop_on_interrupt() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.requested))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
