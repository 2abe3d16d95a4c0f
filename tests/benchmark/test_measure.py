"""Rows: what is wrong is not timed, and what is timed is kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.benchmark import measure
from clipfast.benchmark.exactness import allowed, errors
from clipfast.benchmark.measure import Measurement, Oracle, WrongResult
from clipfast.benchmark.results import Row

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def row(dtype: torch.dtype) -> Row:
    name = str(dtype).removeprefix("torch.")
    return Row(op="gelu", name="gelu", label="gelu", direction="forward", dtype=name, unit="rows", items=64)


def gelu(x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = F.gelu(x)
    return [y.detach(), torch.autograd.grad(y.sum(), x)[0]]


def wrong(index: int, factor: float):
    def call(x: torch.Tensor) -> list[torch.Tensor]:
        results = gelu(x)
        results[index] = results[index] * factor
        return results

    return call


@pytest.fixture
def inputs(request):
    torch.manual_seed(0)
    return [(torch.randn(64, 256),)]


@pytest.fixture(autouse=True)
def no_clock(request, monkeypatch):
    """Nothing may be timed where a side is wrong."""
    if "not_timed" in request.node.name:

        def fail(*arguments: object) -> None:
            raise AssertionError("a wrong side was timed")

        monkeypatch.setattr(measure, "Interleaved", fail)
        monkeypatch.setattr(measure, "peak_bytes", fail)


@pytest.mark.parametrize("index", [0, 1], ids=["result", "gradient"])
@pytest.mark.parametrize("factor", [0.99, 1.01, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_that_is_off_by_a_hundredth_is_not_timed(dtype, factor, index, inputs):
    inputs = [(inputs[0][0].to(dtype),)]
    oracle = Oracle(gelu(inputs[0][0].double()), "PyTorch")
    sides = {"clipfast": wrong(index, factor), "PyTorch": gelu}
    with pytest.raises(WrongResult, match="gelu: clipfast is wrong: error"):
        Measurement(row(dtype), sides, inputs, oracle=oracle, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row(dtype, inputs):
    inputs = [(inputs[0][0].to(dtype),)]
    oracle = Oracle(gelu(inputs[0][0].double()), "PyTorch")

    def breaks(x: torch.Tensor) -> None:
        raise RuntimeError("no kernel image\nfor this card")

    sides = {
        "clipfast": gelu,
        "PyTorch": gelu,
        "absent": "not installed",
        "twice as much": wrong(0, 2.0),
        "broken": breaks,
    }
    measurement = Measurement(row(dtype), sides, inputs, oracle=oracle, device="cpu", saves=True)
    for _ in range(3):
        assert measurement.round() > 0
    found = measurement.row()
    assert list(found.sides) == ["clipfast", "PyTorch"]
    for side in found.sides.values():
        assert len(side.device_s) == len(side.host_s) == 3
        assert 0 < side.error < 1e-2
        assert side.saved_bytes == 0  # the input alone
    assert found.missing["absent"] == "not installed"
    assert found.missing["broken"] == "failed: no kernel image"
    assert found.missing["twice as much"].startswith("wrong: error 1.0e+00, allowed")
    assert found.name == "gelu"


def test_what_ours_raises_is_raised(inputs):
    def breaks(x: torch.Tensor) -> None:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        Measurement(row(torch.float32), {"clipfast": breaks, "PyTorch": gelu}, inputs, device="cpu")


def test_an_oracle_needs_its_reference(inputs):
    oracle = Oracle(gelu(inputs[0][0].double()), "PyTorch")
    with pytest.raises(ValueError, match=r"oracle\.reference: got 'PyTorch', expected one of clipfast"):
        Measurement(row(torch.float32), {"clipfast": gelu}, inputs, oracle=oracle, device="cpu")


def test_rounds_fit_into_the_time(inputs):
    measurement = Measurement(row(torch.float32), {"clipfast": gelu}, inputs, device="cpu")
    assert measurement.rounds(1e-9, 5, 15) == 5
    assert measurement.rounds(1e9, 5, 15) == 15


def test_errors_see_the_furthest_and_the_whole():
    exact = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = errors([exact + torch.tensor([0.0, 0.4])], [exact])
    assert found.largest == pytest.approx(0.1)
    assert found.whole == pytest.approx(0.08)
    assert errors([exact + 1], [exact], scales=[100.0]).largest == pytest.approx(0.01)
    assert errors([exact * float("nan")], [exact]).largest == float("inf")


def test_results_of_other_shapes_are_refused():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"results\[0\]: got shape \(3, 2\), expected \(2, 3\)"):
        errors([exact.T], [exact])
    with pytest.raises(ValueError, match="results: got 2 tensors, expected 1"):
        errors([exact, exact], [exact])


def test_the_rule():
    """Twice the reference's error and two roundings."""
    reference = errors([torch.tensor([1.001])], [torch.tensor([1.0])])
    eps = torch.finfo(torch.float32).eps
    assert allowed(reference, torch.float32).largest == pytest.approx(2 * reference.largest + 2 * eps)
