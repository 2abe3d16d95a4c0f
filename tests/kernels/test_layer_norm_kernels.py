"""LayerNorm's kernels, with and without the residual, against fp64 by the rule of docs/numerics.md."""

from __future__ import annotations

import pytest
import torch
from guarded import GuardedMemory, far_rows, inside_nan
from interpreter import DEVICE
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.kernels import layer_norm as kernels

pytestmark = pytest.mark.usefixtures("triton_backend")

WIDTHS = (256, 320, 512, 768, 1000, 1024, 1280, 4096)
DTYPES = (torch.float32, torch.float16)
if DEVICE == "cuda":  # the interpreter's arithmetic of bfloat16 is not that of the hardware
    DTYPES += (torch.bfloat16,)
EPS = 1e-5
NAMES = ("x", "residual", "weight", "bias")


def drawn(*shape: int, dtype: torch.dtype, weights: torch.dtype | None = None, seed: int = 0) -> list[Tensor]:
    """Return x, residual, weight and bias; the rows have means beside which their spread is small."""
    generator = torch.Generator().manual_seed(seed)
    x, residual = (2 + torch.randn(2, *shape, generator=generator)).to(DEVICE, dtype)
    weight, bias = torch.randn(2, shape[-1], generator=generator).to(DEVICE, weights or dtype)
    return [x, residual, weight, bias]


def many_rows(width: int) -> int:
    """Return rows of which each backward program has several tiles, the last one not full; a card has more programs."""
    tile, programs = kernels._tile(width, 8)[1], 2 * kernels.BACKWARD_PROGRAMS
    return 130 if DEVICE == "cuda" else min(130, (2 * programs + 1) * tile + (tile > 1))


def forward(add: bool, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    if add:
        return ops.add_layer_norm(*inputs, EPS)
    return (ops.layer_norm(inputs[0], *inputs[2:], EPS),)


def results(add: bool, inputs: list[Tensor], grads: list[Tensor], keep_strides: bool = False) -> dict[str, Tensor]:
    """Return the outputs and the gradients of every input."""
    leaves = [(t.detach() if keep_strides else t.detach().clone()).requires_grad_() for t in inputs]
    outputs = forward(add, leaves)
    wanted = leaves if add else [leaves[0], *leaves[2:]]
    found = torch.autograd.grad(outputs, wanted, grads[: len(outputs)])
    names = NAMES if add else ("x", "weight", "bias")
    outputs = dict(zip(("y", "stream"), (o.detach() for o in outputs), strict=False))
    return outputs | {f"gradient of {n}": g for n, g in zip(names, found, strict=True)}


def check(add: bool, inputs: list[Tensor], grads: list[Tensor]) -> None:
    fast = results(add, inputs, grads, keep_strides=True)
    with clipfast.backend("reference"):
        reference = results(add, inputs, grads)
        oracle = results(add, [t.double() for t in inputs], [g.double() for g in grads])
    for name, value in fast.items():
        assert_as_exact_as_reference(value, reference[name], oracle[name], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_add_layer_norm(width: int, dtype: torch.dtype) -> None:
    # in the interpreter nearly all of it is the sums over rows, which take as long for few rows as for many
    for rows in (1, 3, many_rows(width)) if width == 320 else (1, many_rows(width)):
        check(True, drawn(rows, width, dtype=dtype), drawn(rows, width, dtype=dtype, seed=1)[:2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 256, 1000, 4096])
def test_layer_norm(width: int, dtype: torch.dtype) -> None:
    for shape in ((1, width), (2, 3, width), (17, width))[-1 if width == 4096 else 0 :]:
        check(False, drawn(*shape, dtype=dtype), drawn(*shape, dtype=dtype, seed=1)[:1])


@pytest.mark.parametrize("add", [False, True])
def test_half_precision_with_float32_weights(add: bool) -> None:
    inputs = drawn(5, 320, dtype=torch.float16, weights=torch.float32)
    check(add, inputs, drawn(5, 320, dtype=torch.float16, seed=1)[:2])


def test_a_half_precision_branch_on_a_float32_stream() -> None:
    inputs, grads = drawn(5, 320, dtype=torch.float32), drawn(5, 320, dtype=torch.float32, seed=1)[:2]
    inputs[0] = inputs[0].half()
    check(True, inputs, grads)
    assert forward(True, inputs)[1].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [256, 1000])
def test_the_gradient_of_a_bias_before_the_addition(width: int, dtype: torch.dtype) -> None:
    for rows, of_bias in ((3, dtype), (130, torch.float32)):
        inputs = [*drawn(rows, width, dtype=dtype), torch.randn(width).to(DEVICE, of_bias)]
        grads = drawn(rows, width, dtype=dtype, seed=1)[:2]

        def gradients(backend: str, kind: torch.dtype | None = None, inputs=inputs, grads=grads) -> list[Tensor]:
            leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in inputs]
            with clipfast.backend(backend):
                outputs = ops.add_layer_norm(*leaves[:4], EPS, leaves[4])
            return list(torch.autograd.grad(outputs, leaves, [g.to(kind or g.dtype) for g in grads]))

        found, again = gradients("triton"), gradients("triton")
        reference, oracle = gradients("reference"), gradients("reference", torch.float64)
        for name, *values in zip((*NAMES, "bias of x"), found, reference, oracle, strict=True):
            assert_as_exact_as_reference(*values, name)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        assert torch.allclose(oracle[4], oracle[0].sum(0))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("width", [320, 512])
def test_nothing_beside_the_rows_is_read_or_written(add: bool, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [inside_nan(t) for t in drawn(2, 9, width, dtype=torch.float32)]
    inputs[2:] = (t.contiguous() for t in inputs[2:])
    grads = [inside_nan(t) for t in drawn(2, 9, width, dtype=torch.float32, seed=1)[:2]]
    memory = GuardedMemory(monkeypatch)
    found = results(add, inputs, grads, keep_strides=True)
    memory.check()
    assert not any(value.isnan().any() for value in found.values())
    check(add, inputs, grads)


@pytest.mark.parametrize(
    "view",
    [lambda x: x[:, ::2], lambda x: x[:, 0], lambda x: x.transpose(0, 1), lambda x: x[..., ::2], lambda x: x[0, 0]],
    ids=["every other token", "first token", "transposed", "every other column", "one row"],
)
def test_strides(view) -> None:
    x, residual, weight, bias = drawn(4, 6, 256, dtype=torch.float32)
    x, residual = view(x), view(residual)
    inputs = [x, residual, weight[: x.shape[-1]], bias[: x.shape[-1]]]
    check(True, inputs, [view(t) for t in drawn(4, 6, 256, dtype=torch.float32, seed=1)[:2]])


@pytest.mark.parametrize("add", [False, True])
def test_an_empty_batch(add: bool) -> None:
    inputs = drawn(0, 320, dtype=torch.float32)
    found = results(add, inputs, inputs[:2])
    assert found["y"].shape == found["gradient of x"].shape == (0, 320)
    assert not found["gradient of weight"].any()
    assert not found["gradient of bias"].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_twice_and_in_any_batch(dtype: torch.dtype) -> None:
    inputs, grads = drawn(37, 512, dtype=dtype), drawn(37, 512, dtype=dtype, seed=1)[:2]
    first, second = results(True, inputs, grads), results(True, inputs, grads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    alone = results(True, [t[5:6] for t in inputs[:2]] + inputs[2:], [g[5:6] for g in grads])
    for name in ("y", "stream", "gradient of x", "gradient of residual"):
        assert torch.equal(alone[name], first[name][5:6]), name


@pytest.mark.parametrize(("rows", "width"), [(1, 320), (37, 512), (130, 768), (0, 320)])
def test_column_sums_are_the_gradient_of_a_bias_before(rows: int, width: int) -> None:
    # of a bias that was added to every row of x, as a projection does: in fp64 the sum of the gradient of x
    x, residual, weight, bias = drawn(rows, width, dtype=torch.float32)
    dy, dstream = drawn(rows, width, dtype=torch.float32, seed=1)[:2]
    oracle = [t.double().requires_grad_() for t in (torch.zeros(width, device=DEVICE), x, residual, weight, bias)]
    with clipfast.backend("reference"):
        outputs = ops.add_layer_norm(oracle[0] + oracle[1], *oracle[2:], EPS)
        plain = [t.detach().float().requires_grad_() for t in oracle]
        plainly = ops.add_layer_norm(plain[0] + plain[1], *plain[2:], EPS)
    (expected,) = torch.autograd.grad(outputs, oracle[:1], [dy.double(), dstream.double()])
    (reference,) = torch.autograd.grad(plainly, plain[:1], [dy, dstream])
    _, stream, mean, rstd = kernels.add_forward(x, residual, weight, bias, EPS)
    arguments = (dy, dstream, stream, weight, mean, rstd, x.dtype, x.dtype)
    *without, sums = kernels.add_backward(*arguments, torch.float32)
    assert_as_exact_as_reference(sums, reference, expected, "column sums")
    # nothing else changes, and every dtype is a rounding of one sum
    assert all(torch.equal(a, b) for a, b in zip(without, kernels.add_backward(*arguments)[:4], strict=True))
    assert torch.equal(kernels.add_backward(*arguments, torch.float16)[-1], sums.half())


@pytest.mark.skipif(DEVICE == "cuda", reason="takes the memory between the rows on a GPU")
def test_offsets_beyond_32_bits() -> None:
    x, residual, weight, bias = drawn(3, 256, dtype=torch.float16)
    grads = drawn(3, 256, dtype=torch.float16, seed=1)[:2]
    expected = results(True, [x, residual, weight, bias], grads)
    y, stream, mean, rstd = kernels.add_forward(far_rows(x), far_rows(residual), weight, bias, EPS)
    assert torch.equal(y, expected["y"])
    assert torch.equal(stream, expected["stream"])
    found = kernels.add_backward(
        far_rows(grads[0]), far_rows(grads[1]), far_rows(stream), weight, mean, rstd, x.dtype, x.dtype
    )
    assert torch.equal(found[0], expected["gradient of x"])
    assert torch.equal(found[2], expected["gradient of weight"])


def test_refusals_name_the_reason() -> None:
    x, _, weight, bias = drawn(2, 4097, dtype=torch.float32)
    assert "width 4097 is not served" in clipfast.explain("layer_norm", x, weight, bias)
    x, residual, weight, bias = drawn(2, 64, dtype=torch.float32)
    with pytest.warns(ops.FallbackWarning, match="float64 is not served"):
        ops.add_layer_norm(x.double(), residual.double(), weight, bias)
    assert "weight and bias differ in dtype" in clipfast.explain("layer_norm", x, weight, bias.half())
