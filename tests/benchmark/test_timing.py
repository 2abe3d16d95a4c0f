"""Clocks and rounds, on a clock that the tests turn."""

from __future__ import annotations

import pytest
import torch

from clipfast.benchmark import timing
from clipfast.benchmark.timing import Clock, Interleaved


class FakeTime:
    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def call_of(self, seconds: float, log: list[str] | None = None, name: str = "") -> object:
        def call(*arguments: object) -> None:
            self.now += seconds
            if log is not None:
                log.append(name)

        return call


@pytest.fixture
def fake_time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(timing, "time", fake)
    return fake


def test_a_round_is_the_time_of_one_call(fake_time):
    assert Clock("cpu").round(fake_time.call_of(0.003), [()], 7) == pytest.approx((0.003, 0.003))


@pytest.mark.parametrize(("seconds", "calls"), [(2.0, 1), (0.004, 2), (1e-4, 100), (1e-7, 1000)])
def test_a_round_is_long_enough(fake_time, seconds, calls):
    assert Clock("cpu").calls_a_round(fake_time.call_of(seconds), [()]) == (calls, pytest.approx(seconds))


def test_inputs_are_taken_in_turn(fake_time):
    seen = []
    Clock("cpu").round(seen.append, [(1,), (2,), (3,)], 7)
    assert seen == [1, 2, 3, 1, 2, 3, 1]


def test_sides_run_in_turn_and_each_goes_first(fake_time):
    log: list[str] = []
    sides = {name: fake_time.call_of(seconds, log, name) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    timed = Interleaved(Clock("cpu"), sides, [()])
    assert timed.round_s == pytest.approx(7.0)
    log.clear()
    for _ in range(6):
        timed.round()
    # each goes first as often as the others, and behind each of them as often as before it
    assert "".join(log) == "abccbabcaacbcabbac"
    assert timed.device_s == {
        "a": pytest.approx([1.0] * 6),
        "b": pytest.approx([2.0] * 6),
        "c": pytest.approx([4.0] * 6),
    }
    assert timed.host_s == timed.device_s


def test_an_unknown_device_is_refused():
    with pytest.raises(ValueError, match=r"Clock\(device\): got 'tpu', expected 'cuda' or 'cpu'"):
        Clock("tpu")


@pytest.fixture
def spin():
    """A kernel that ends when the GPU's own clock has gone on by so many nanoseconds."""
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.language.extra.cuda import globaltimer

    @triton.jit
    def kernel(out, nanoseconds):
        start = globaltimer()
        now = start
        while now - start < nanoseconds:
            now = globaltimer()
        tl.store(out, now - start)

    return kernel


@pytest.mark.gpu
@pytest.mark.parametrize(("microseconds", "calls", "within"), [(5000, 3, 0.02), (200, 20, 0.05), (20, 100, 0.25)])
def test_the_device_clock_against_a_kernel_of_known_duration(spin, microseconds, calls, within):
    out = torch.zeros(1, dtype=torch.int64, device="cuda")

    def call() -> None:
        spin[(1,)](out, microseconds * 1000, num_warps=1)

    call()
    clock = Clock("cuda")
    device, _ = clock.round(call, [()], calls)
    took = out.item() / 1e9
    assert took == pytest.approx(microseconds / 1e6, rel=0.25)  # the GPU's clock ticks every microsecond on some cards
    assert device == pytest.approx(took, rel=within)
    replay = clock.replayed(call, [()], calls)
    assert replay is not None
    assert clock.round(replay, [()], 1)[0] / calls == pytest.approx(took, rel=within)
