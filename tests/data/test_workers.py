"""Processes that read: how they end."""

from __future__ import annotations

import os
import signal

import pytest

from clipfast.data.workers import Workers


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="no SIGCHLD")
def test_a_worker_that_aborts_as_it_ends_is_no_accident():
    def accident(*_: object) -> None:
        raise RuntimeError("a worker is killed by signal: Aborted")

    before = signal.signal(signal.SIGCHLD, accident)
    try:
        worker = Workers().Process(target=os.abort)
        worker.deadline = float("inf")
        worker.start()
        worker.join(timeout=60.0)
        assert worker.exitcode == -signal.SIGABRT
        assert signal.getsignal(signal.SIGCHLD) is accident
    finally:
        signal.signal(signal.SIGCHLD, before)
