"""What calls take and graphs keep, against what is known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clipfast.benchmark.memory import peak_bytes, saved_bytes

MB = 10**6


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel counts pages on Linux alone")
@pytest.mark.parametrize("size", [20, 200])
def test_the_peak_of_a_call(size):
    def call() -> torch.Tensor:
        kept = torch.ones(size * MB // 4)
        gone = torch.ones(size * MB // 4) + 1  # two of these for a moment
        del gone
        return kept

    call()
    for _ in range(2):  # the second time too: what the first one freed is not there any more
        assert peak_bytes(call, "cpu") == pytest.approx(3 * size * MB, rel=0.05, abs=MB)


def test_a_call_that_takes_nothing():
    assert peak_bytes(lambda: None, "cpu") in (None, *range(MB))


def test_a_graph_keeps_what_is_not_a_leaf():
    x, weight = torch.randn(30, 20, requires_grad=True), torch.randn(20, 50, requires_grad=True)

    def call() -> torch.Tensor:
        hidden = x @ weight.T.T  # keeps x and weight, which are leaves or look at one
        return torch.nn.functional.gelu(hidden).exp().sum()  # keeps the hidden layer, and the exponential

    assert saved_bytes(call) == 2 * 30 * 50 * 4


def test_memory_that_two_tensors_look_at_counts_once():
    x = torch.randn(8, 16, requires_grad=True)

    def call() -> torch.Tensor:
        y = x + 1
        return (y * y.view(16, 8).view(8, 16)).sum()

    assert saved_bytes(call) == 8 * 16 * 4


def test_nothing_is_kept_without_gradients():
    x = torch.randn(8, 16)
    assert saved_bytes(lambda: (x * x).exp()) == 0
