"""The kernels of bias and GELU against fp64 by the rule of docs/numerics.md."""

from __future__ import annotations

import pytest
import torch
from guarded import GuardedMemory, far_rows, inside_nan
from interpreter import DEVICE
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.kernels import bias_gelu as kernels

pytestmark = pytest.mark.usefixtures("triton_backend")

FORMS = ("none", "tanh", "quick")
# each form at small and large widths, powers of two and others
CASES = [(form, 320) for form in FORMS] + list(
    zip(FORMS * 3, (256, 512, 768, 1000, 1024, 1280, 4096, 257), strict=False)
)
DTYPES = (torch.float32, torch.float16)
if DEVICE == "cuda":  # the interpreter's arithmetic of bfloat16 is not that of the hardware
    DTYPES += (torch.bfloat16,)


def drawn(*shape: int, dtype: torch.dtype, bias: torch.dtype | None = None, seed: int = 0) -> list[Tensor]:
    """Return x and bias, with values from the middle and from both tails of the GELU."""
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
    return [x, torch.randn(shape[-1], generator=generator).to(DEVICE, bias or dtype)]


def results(inputs: list[Tensor], form: str, grad: Tensor, keep_strides: bool = False) -> dict[str, Tensor]:
    leaves = [(t.detach() if keep_strides else t.detach().clone()).requires_grad_() for t in inputs]
    y = ops.bias_gelu(leaves[0], leaves[1] if len(leaves) > 1 else None, form)
    found = torch.autograd.grad(y, leaves, grad)
    gradients = {f"gradient of {n}": g for n, g in zip(("x", "bias"), found, strict=False)}
    return {"y": y.detach()} | gradients


def check(inputs: list[Tensor], form: str, grad: Tensor) -> None:
    fast = results(inputs, form, grad, keep_strides=True)
    with clipfast.backend("reference"):
        reference = results(inputs, form, grad)
        oracle = results([t.double() for t in inputs], form, grad.double())
    for name, value in fast.items():
        assert_as_exact_as_reference(value, reference[name], oracle[name], f"{name}, {form}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("form", "width"), CASES)
def test_against_the_oracle(form: str, width: int, dtype: torch.dtype) -> None:
    # on a CPU six programs at most share the tiles of 8 rows
    many = 130 if DEVICE == "cuda" else 65 if width < 4096 else 33
    for rows in (1, 3, many):
        check(drawn(rows, width, dtype=dtype), form, drawn(rows, width, dtype=dtype, seed=1)[0])


@pytest.mark.parametrize("form", FORMS)
def test_without_a_bias_and_with_one_in_float32(form: str) -> None:
    grad = drawn(2, 5, 320, dtype=torch.float16, seed=1)[0]
    check(drawn(2, 5, 320, dtype=torch.float16)[:1], form, grad)
    check(drawn(2, 5, 320, dtype=torch.float16, bias=torch.float32), form, grad)


@pytest.mark.parametrize("form", FORMS)
def test_tails(form: str) -> None:
    values = [0.0, -0.0, 1e-30, 1e-4, -1e-4, 5, -5, 13, -13, 60, -60, 1e4, -1e4, 1e15, -1e15, 3e38]
    x = torch.tensor([values], device=DEVICE)
    y, gradient = results([x], form, torch.ones_like(x)).values()
    with clipfast.backend("reference"):
        oracle = results([x.double()], form, torch.ones_like(x).double())
    assert not y.isnan().any()
    assert not gradient.isnan().any()
    error = (y.double() - oracle["y"]).abs()
    assert (error <= 2e-7 * torch.maximum(x.double().abs().clamp(max=1), oracle["y"].abs())).all()
    assert ((gradient.double() - oracle["gradient of x"]).abs() < 1e-6).all()


@pytest.mark.parametrize("form", FORMS)
def test_nothing_beside_the_rows_is_read_or_written(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [inside_nan(t) for t in drawn(2, 9, 600, dtype=torch.float32)]
    grad = inside_nan(drawn(2, 9, 600, dtype=torch.float32, seed=1)[0])
    memory = GuardedMemory(monkeypatch)
    found = results(inputs, form, grad, keep_strides=True)
    memory.check()
    assert not any(value.isnan().any() for value in found.values())
    check(inputs, form, grad)


def test_strides_and_an_empty_batch() -> None:
    (x, bias), grad = drawn(4, 6, 256, dtype=torch.float32), drawn(4, 6, 256, dtype=torch.float32, seed=1)[0]
    for view in (lambda t: t[:, ::2], lambda t: t[:, 0], lambda t: t.transpose(0, 1), lambda t: t[0, 0]):
        check([view(x), bias], "none", view(grad))
    found = results([x[:0], bias], "none", grad[:0])
    assert found["y"].shape == (0, 6, 256)
    assert not found["gradient of bias"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_twice_and_in_any_batch(dtype: torch.dtype) -> None:
    inputs, grad = drawn(70, 512, dtype=dtype), drawn(70, 512, dtype=dtype, seed=1)[0]
    first, second = results(inputs, "tanh", grad), results(inputs, "tanh", grad)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = results([inputs[0][5:6], inputs[1]], "tanh", grad[5:6])
    assert torch.equal(alone["y"], first["y"][5:6])
    assert torch.equal(alone["gradient of x"], first["gradient of x"][5:6])


@pytest.mark.skipif(DEVICE == "cuda", reason="takes the memory between the rows on a GPU")
def test_offsets_beyond_32_bits() -> None:
    (x, bias), grad = drawn(3, 256, dtype=torch.float16), drawn(3, 256, dtype=torch.float16, seed=1)[0]
    expected = results([x, bias], "none", grad)
    assert torch.equal(kernels.forward(far_rows(x), bias, "none"), expected["y"])
    dx, dbias = kernels.backward(far_rows(grad), far_rows(x), bias, "none")
    assert torch.equal(dx, expected["gradient of x"])
    assert torch.equal(dbias, expected["gradient of bias"])


def test_only_the_pre_activation_is_saved() -> None:
    x, bias = (t.requires_grad_() for t in drawn(4, 256, dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.bias_gelu(x, bias)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), bias.data_ptr()}
