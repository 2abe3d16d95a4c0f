from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from clipfast.train.interrupt import Stopped, stop_on_interrupt


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


def test_one_request_for_all_that_is_inside():
    with stop_on_interrupt() as outer:
        with stop_on_interrupt() as inner:
            press_ctrl_c()
        assert inner is outer
        assert outer.asked()
        # the inner one has not given the signals back
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_what_may_be_left_at_any_point_is_left_at_once(signum):
    with stop_on_interrupt() as stop:
        with pytest.raises(Stopped), stop.at_once():
            os.kill(os.getpid(), signum)
        assert stop.requested
        # one that came before counts, too
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("it was begun")


@pytest.mark.parametrize(
    ("first", "second", "seconds", "under_torchrun", "ends"),
    [
        (signal.SIGTERM, signal.SIGTERM, 0.0, False, False),
        (signal.SIGTERM, signal.SIGTERM, 3.0, False, True),
        (signal.SIGTERM, signal.SIGINT, 0.0, False, True),
        (signal.SIGTERM, signal.SIGTERM, 3.0, True, False),
        (signal.SIGINT, signal.SIGINT, 3.0, True, False),
    ],
)
def test_an_echo_of_the_first_signal_is_no_second_wish(monkeypatch, first, second, seconds, under_torchrun, ends):
    """`timeout` and schedulers signal a process and its group; torchrun repeats what all have got already."""
    killed = []
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if under_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with stop_on_interrupt() as stop:
        os.kill(os.getpid(), first)
        stop.since -= seconds
        kill = os.kill
        monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append(signum))
        try:
            kill(os.getpid(), second)
        except KeyboardInterrupt:
            killed.append(signal.SIGINT)
        assert killed == ([second] if ends else [])
