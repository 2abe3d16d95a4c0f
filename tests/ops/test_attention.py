"""Attention: every implementation against an fp64 oracle, packed sequences, and errors."""

from __future__ import annotations

import warnings

import interpreter
import pytest
import torch
from oracle import assert_as_exact_as_reference, relative_error
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.ops.attention import attention_weights


def oracle(qkv: Tensor, causal: bool, scale: float) -> Tensor:
    """Return softmax attention of one sequence ``[N, 3, H, D]``, written out head by head."""
    out = []
    for head in range(qkv.shape[2]):
        query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        rows = []
        for i in range(qkv.shape[0]):
            seen = i + 1 if causal else qkv.shape[0]
            weights = torch.exp(scale * (key[:seen] @ query[i]) - scale * (key[:seen] @ query[i]).max())
            rows.append((weights / weights.sum()) @ value[:seen])
        out.append(torch.stack(rows))
    return torch.stack(out, dim=1).flatten(1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_against_attention_written_out(backend: str, causal: bool, tokens: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 2, 8, dtype=torch.float64)
    with clipfast.backend(backend):
        actual = ops.attention(qkv, 2, causal=causal)
    expected = torch.stack([oracle(sequence, causal, 8**-0.5) for sequence in qkv])
    assert relative_error(actual, expected) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [50, 77, 197])
def test_as_exact_as_the_reference(dtype: torch.dtype, causal: bool, tokens: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, tokens, 3 * 2 * 64).to(dtype)
    cotangent = torch.randn(2, tokens, 2 * 64).to(dtype)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().to(dtype).requires_grad_()
        with clipfast.backend(backend):
            out = ops.attention(leaf, 2, causal=causal)
        out.backward(cotangent.to(dtype))
        return out, leaf.grad

    results = zip(run("torch", dtype), run("reference", dtype), run("reference", torch.float64), strict=True)
    for what, (fast, reference, exact) in zip(("output", "gradient"), results, strict=True):
        assert_as_exact_as_reference(fast, reference, exact, what)


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_are_each_on_their_own(causal: bool) -> None:
    torch.manual_seed(0)
    lengths = [3, 1, 0, 7]
    qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64)
    offsets = torch.tensor([0, 3, 4, 4, 11], dtype=torch.int32)
    actual = ops.attention(qkv, 2, causal=causal, cu_seqlens=offsets)
    expected = torch.cat([oracle(s, causal, 8**-0.5) for s in qkv.split(lengths) if len(s)])
    assert relative_error(actual, expected) < 1e-13
    flat = ops.attention(qkv.flatten(1), 2, causal=causal, cu_seqlens=offsets)
    assert torch.equal(flat, actual)


def ragged(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "offsets",
    [ragged(3, 1, 0, 7, 3, 1), ragged(4, 4, 4), ragged(0, 5), ragged(0, 0), torch.tensor([0], dtype=torch.int32)],
    ids=["many lengths", "one length", "one sequence", "no tokens", "no sequences"],
)
def test_packed_sequences_by_length(offsets: Tensor, causal: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(int(offsets[-1]), 3, 2, 8, dtype=torch.float64)
    cotangent = torch.randn(len(qkv), 16, dtype=torch.float64)

    def run(backend: str) -> tuple[Tensor, Tensor]:
        leaf = qkv.clone().requires_grad_()
        with clipfast.backend(backend):
            out = ops.attention(leaf, 2, causal=causal, cu_seqlens=offsets)
        return out.detach(), *torch.autograd.grad(out, leaf, cotangent)

    for actual, expected in zip(run("torch"), run("reference"), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def test_packed_gradients_of_gradients() -> None:
    qkv = torch.randn(6, 3 * 4, dtype=torch.float64, requires_grad=True)

    def packed(x: Tensor) -> Tensor:
        # SDPA's explicit form has second derivatives
        with clipfast.backend("torch"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return ops.attention(x, 2, causal=True, cu_seqlens=ragged(2, 1, 3))

    assert torch.autograd.gradcheck(packed, qkv)
    assert torch.autograd.gradgradcheck(packed, qkv)


def test_packed_sequences_are_called_for_by_length_and_not_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, *args, **options: calls.append(tuple(query.shape)) or sdpa(query, *args, **options),
    )
    ops.attention(torch.randn(3 * 50 + 5 * 10, 48), 2, cu_seqlens=ragged(*[3, 5] * 10, *[3] * 40))
    assert sorted(calls) == [(10, 2, 5, 8), (50, 2, 3, 8)]


@pytest.mark.parametrize("causal", [False, True])
def test_packed_sequences_compile(causal: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(11, 3 * 2 * 8)

    def run(function) -> tuple[Tensor, ...]:
        leaf = qkv.clone().requires_grad_()
        out = function(leaf, ragged(3, 1, 0, 7))
        return out.detach(), *torch.autograd.grad(out.square().sum(), leaf)

    def packed(x: Tensor, offsets: Tensor) -> Tensor:
        return ops.attention(x, 2, causal=causal, cu_seqlens=offsets)

    for actual, expected in zip(run(torch.compile(packed, fullgraph=True)), run(packed), strict=True):
        torch.testing.assert_close(actual, expected)


def test_the_triton_backend_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter.leave_out(monkeypatch)
    qkv = torch.randn(2, 5, 3 * 64)

    def forced() -> Tensor:
        with clipfast.backend("triton"):
            return ops.attention(qkv, 2)

    expected = ops.attention(qkv, 2)
    with pytest.warns(ops.FallbackWarning, match="attention does not use the triton backend"):
        assert torch.equal(forced(), expected)
    with warnings.catch_warnings():
        # once is enough
        warnings.simplefilter("error")
        assert torch.equal(forced(), expected)


def test_layouts_and_scale() -> None:
    torch.manual_seed(0)
    wide = torch.randn(2, 5, 3 * 16 + 4, dtype=torch.float64)
    sliced = wide[..., : 3 * 16]
    assert not sliced.is_contiguous()
    packed = sliced.unflatten(-1, (3, 2, 8))
    assert torch.equal(ops.attention(sliced, 2), ops.attention(packed, 2))
    expected = torch.stack([oracle(sequence, False, 0.3) for sequence in packed])
    assert relative_error(ops.attention(packed, 2, scale=0.3), expected) < 1e-13


def test_gradients_of_gradients() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 3, 3 * 4, dtype=torch.float64, requires_grad=True)
    with clipfast.backend("reference"):
        assert torch.autograd.gradcheck(lambda x: ops.attention(x, 2, causal=True), qkv)
        assert torch.autograd.gradgradcheck(lambda x: ops.attention(x, 2, causal=True), qkv)


def test_weights_sum_to_one() -> None:
    torch.manual_seed(0)
    weights = attention_weights(torch.randn(2, 5, 3, 2, 8, dtype=torch.float64), 2, causal=True)
    assert weights.shape == (2, 2, 5, 5)
    assert weights.triu(1).count_nonzero() == 0
    assert relative_error(weights.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64)) < 1e-14


def test_an_empty_batch() -> None:
    assert ops.attention(torch.zeros(0, 5, 48), 2).shape == (0, 5, 16)
    empty = ops.attention(torch.zeros(0, 48), 2, cu_seqlens=torch.tensor([0], dtype=torch.int32))
    assert empty.shape == (0, 16)


@pytest.mark.parametrize(
    ("shape", "heads", "message"),
    [
        ((2, 5, 50), 2, r"got shape \(2, 5, 50\), expected \[B, N, 3·H·D\]"),
        ((2, 5, 3, 4, 8), 2, "num_heads = 2"),
        ((5, 48), 2, r"got shape \(5, 48\)"),
        ((2, 0, 48), 2, "got 0 tokens"),
        ((2, 5, 48), 0, "num_heads = 0"),
    ],
)
def test_wrong_shapes(shape: tuple[int, ...], heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(torch.zeros(shape), heads)


def test_wrong_dtype() -> None:
    with pytest.raises(TypeError, match=r"got torch.int64, expected a floating-point dtype"):
        ops.attention(torch.zeros(2, 5, 48, dtype=torch.long), 2)


@pytest.mark.parametrize(
    ("offsets", "error"),
    [
        (torch.tensor([1, 5]), ValueError),
        (torch.tensor([0, 4]), ValueError),
        (torch.tensor([0, 4, 2, 5]), ValueError),
        (torch.tensor([[0, 5]]), ValueError),
        (torch.tensor([], dtype=torch.int32), ValueError),
        (torch.tensor([0.0, 5.0]), TypeError),
    ],
)
def test_wrong_cu_seqlens(offsets: Tensor, error: type[Exception]) -> None:
    with pytest.raises(error, match="cu_seqlens"):
        ops.attention(torch.zeros(5, 48), 2, cu_seqlens=offsets)


@pytest.mark.parametrize("causal", [False, True])
def test_the_backward_pass_copies_no_gradient_once_more(causal: bool) -> None:
    """SDPA's three gradients are stacked as qkv lies: nothing else but views stands between them and the caller."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Names(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view:
                self.names.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    for shape in ((2, 9, 3 * 64), (2, 9, 3, 2, 32)):
        qkv = torch.randn(shape, requires_grad=True)
        out = ops.attention(qkv, 2, causal=causal)
        with Names() as mode:
            (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        assert gradient.is_contiguous()
        sdpa, *rest = [n for n in mode.names if n not in ("ones_like", "detach")]
        assert "scaled_dot_product" in sdpa
        assert rest == ["stack"]
