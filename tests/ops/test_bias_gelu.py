"""The three GELUs against their formulas in fp64: none stands in for another."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import relative_error
from torch import Tensor

from clipfast import ops

FORMULAS = {
    "none": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick": lambda x: x / (1 + torch.exp(-1.702 * x)),
}


def values() -> tuple[Tensor, Tensor]:
    return torch.linspace(-6, 6, 120, dtype=torch.float64).reshape(10, 12), torch.linspace(-1, 1, 12).double()


@pytest.mark.parametrize("approximate", FORMULAS)
def test_against_the_formula(approximate: str) -> None:
    x, bias = values()
    formula = FORMULAS[approximate]
    assert relative_error(ops.bias_gelu(x, None, approximate), formula(x)) < 1e-14
    assert relative_error(ops.bias_gelu(x, bias, approximate), formula(x + bias)) < 1e-14


def test_the_three_differ() -> None:
    x, _ = values()
    results = [ops.bias_gelu(x, None, a) for a in FORMULAS]
    assert relative_error(results[1], results[0]) > 1e-5
    assert relative_error(results[2], results[0]) > 1e-3


@pytest.mark.parametrize("approximate", FORMULAS)
def test_gradients(approximate: str) -> None:
    x, bias = (t.requires_grad_() for t in values())
    assert torch.autograd.gradcheck(lambda x, b: ops.bias_gelu(x, b, approximate), (x, bias))


def test_errors() -> None:
    x, _ = values()
    with pytest.raises(TypeError, match=r"bias_gelu\(x\): got torch.int64"):
        ops.bias_gelu(x.long())
    with pytest.raises(ValueError, match=r"bias_gelu\(bias\): got shape \(3,\), expected \(12,\)"):
        ops.bias_gelu(x, torch.zeros(3))
    with pytest.raises(
        ValueError, match=r"bias_gelu\(approximate\): got 'erf', expected one of 'none', 'tanh', 'quick'"
    ):
        ops.bias_gelu(x, None, "erf")
