"""LayerNorm, with and without the residual addition, against the formula in fp64."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_exact_as_reference, relative_error
from torch import Tensor

from clipfast import ops

EPS = 1e-5


def oracle(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def parameters(width: int) -> tuple[Tensor, Tensor]:
    return torch.randn(width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 96), (2, 3, 100), (0, 96), (1, 1)])
def test_against_the_formula(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, residual, (weight, bias) = *torch.randn(2, *shape, dtype=torch.float64), parameters(shape[-1])
    if x.numel() == 0:
        assert ops.layer_norm(x, weight, bias, EPS).shape == shape
        return
    assert relative_error(ops.layer_norm(x, weight, bias, EPS), oracle(x, weight, bias)) < 1e-13
    y, stream = ops.add_layer_norm(x, residual, weight, bias, EPS)
    assert relative_error(stream, x + residual) < 1e-15
    assert relative_error(y, oracle(x + residual, weight, bias)) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_statistics_are_taken_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # in half precision the squares of these would overflow, or lose the spread beside the mean
    x = (300 + 8 * torch.randn(16, 512)).to(dtype)
    weight, bias = parameters(512)
    weight, bias = weight.to(dtype), bias.to(dtype)
    exact = oracle(x.double(), weight.double(), bias.double())
    y = ops.layer_norm(x, weight, bias, EPS)
    assert_as_exact_as_reference(y, exact.to(dtype), exact, "output")


def test_weights_of_another_dtype_keep_their_digits() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 64).bfloat16()
    weight, bias = (p.float() for p in parameters(64))
    y = ops.layer_norm(x, weight, bias, EPS)
    assert y.dtype == torch.bfloat16
    exact = oracle(x.double(), weight.double(), bias.double())
    assert_as_exact_as_reference(y, exact.bfloat16(), exact, "output")


def test_gradients() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    inputs += [p.requires_grad_() for p in parameters(6)]
    assert torch.autograd.gradcheck(ops.add_layer_norm, inputs)


def test_the_gradient_of_a_bias_that_is_in_x_already() -> None:
    torch.manual_seed(0)
    x, residual = (torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    constant, (weight, bias) = torch.randn(6, dtype=torch.float64, requires_grad=True), parameters(6)
    with_it = ops.add_layer_norm(x + constant.detach(), residual, weight, bias, EPS, constant)
    plain = ops.add_layer_norm(x + constant, residual, weight, bias, EPS)
    for found, expected in zip(with_it, plain, strict=True):
        assert torch.equal(found, expected)
    found, expected = (
        torch.autograd.grad([o.sin().sum() for o in outputs], (x, residual, constant)) for outputs in (with_it, plain)
    )
    for name, *pair in zip(("x", "residual", "constant"), found, expected, strict=True):
        assert relative_error(*pair) < 1e-14, name


def test_inputs_are_not_altered() -> None:
    x, residual, (weight, bias) = *torch.randn(2, 4, 8, dtype=torch.float64), parameters(8)
    copies = [t.clone() for t in (x, residual, weight, bias)]
    ops.add_layer_norm(x, residual, weight, bias, EPS)
    assert all(torch.equal(a, b) for a, b in zip((x, residual, weight, bias), copies, strict=True))


def test_errors() -> None:
    x, one = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(TypeError, match=r"layer_norm\(x\): got torch.int64"):
        ops.layer_norm(x.long(), one, one)
    with pytest.raises(ValueError, match=r"layer_norm\(bias\): got shape \(7,\), expected \(8,\)"):
        ops.layer_norm(x, one, torch.ones(7))
    with pytest.raises(ValueError, match=r"add_layer_norm\(residual\): got shape \(3, 8\), expected \(2, 8\)"):
        ops.add_layer_norm(x, torch.zeros(3, 8), one, one)
    with pytest.raises(ValueError, match=r"add_layer_norm\(bias_of_x\): got shape \(7,\), expected \(8,\)"):
        ops.add_layer_norm(x, x, one, one, EPS, torch.ones(7))
