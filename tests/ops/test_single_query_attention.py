"""Attention of one query a sequence: against softmax written out, every implementation's exactness, and errors."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_exact_as_reference, relative_error
from torch import Tensor

import clipfast
from clipfast import ops

LENGTHS = [3, 1, 7, 3, 7, 2]
PACKED_ORDERS = {"in order": sorted(LENGTHS), "mixed": LENGTHS, "one": [4], "equal": [5, 5, 5], "groups": [3, 3, 1, 5]}


def written_out(query: Tensor, key: Tensor, value: Tensor, heads: int, scale: float) -> Tensor:
    """Return ``[H·D]`` for one query ``[H·D]`` and its keys and values ``[n, H·D]``."""
    out = []
    for q, k, v in zip(query.chunk(heads), key.chunk(heads, dim=-1), value.chunk(heads, dim=-1), strict=True):
        weights = torch.exp(scale * (k @ q) - (scale * (k @ q)).max())
        out.append((weights / weights.sum()) @ v)
    return torch.cat(out)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("lengths", [None, [7, 1, 4]])
def test_dense_against_attention_written_out(backend: str, lengths: list[int] | None) -> None:
    torch.manual_seed(0)
    query, key, value = drawn(3, 8), drawn(3, 7, 8), drawn(3, 7, 8)
    with clipfast.backend(backend):
        actual = ops.single_query_attention(
            query, key, value, 2, lengths=None if lengths is None else torch.tensor(lengths), scale=0.3
        )
    ends = lengths or [7, 7, 7]
    expected = torch.stack(
        [written_out(q, k[:n], v[:n], 2, 0.3) for q, k, v, n in zip(query, key, value, ends, strict=True)]
    )
    assert relative_error(actual, expected) < 1e-13


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("lengths", PACKED_ORDERS.values(), ids=PACKED_ORDERS.keys())
def test_packed_against_attention_written_out(backend: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    query, key, value = drawn(len(lengths), 8), drawn(sum(lengths), 8), drawn(sum(lengths), 8)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)])
    tensors = [t.requires_grad_() for t in (query, key, value)]
    with clipfast.backend(backend):
        actual = ops.single_query_attention(*tensors, 2, cu_seqlens=cu_seqlens)
    expected = torch.stack(
        [
            written_out(q, k, v, 2, 4**-0.5)
            for q, k, v in zip(query, key.split(lengths), value.split(lengths), strict=True)
        ]
    )
    assert relative_error(actual, expected) < 1e-13
    cotangent = drawn(*actual.shape)
    for got, want in zip(
        torch.autograd.grad(actual, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent), strict=True
    ):
        assert float((got - want).abs().max()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packed", [False, True])
def test_as_exact_as_the_reference(dtype: torch.dtype, packed: bool) -> None:
    torch.manual_seed(0)
    sequences, tokens, width = 4, 50, 128
    tensors = [torch.randn(sequences, width), *torch.randn(2, sequences, tokens, width)]
    offsets = None
    if packed:
        tensors[1:] = [t.flatten(0, 1) for t in tensors[1:]]
        offsets = torch.tensor([0, 20, 97, 130, 200])
    cotangent = torch.randn(sequences, width)

    def run(backend: str, dtype_: torch.dtype) -> list[Tensor]:
        # rounded once, so that all start from the same numbers
        leaves = [t.to(dtype).to(dtype_).clone().requires_grad_() for t in tensors]
        with clipfast.backend(backend):
            out = ops.single_query_attention(*leaves, 2, cu_seqlens=offsets)
        out.backward(cotangent.to(dtype).to(dtype_))
        return [out, *(leaf.grad for leaf in leaves)]

    results = zip(run("torch", dtype), run("reference", dtype), run("reference", torch.float64), strict=True)
    for what, (fast, reference, exact) in zip(("output", "query", "key", "value"), results, strict=True):
        assert_as_exact_as_reference(fast, reference, exact, what)


def test_it_is_a_row_of_attention() -> None:
    torch.manual_seed(0)
    qkv = drawn(2, 5, 3 * 8)
    query, key, value = qkv.chunk(3, dim=-1)
    rows = ops.attention(qkv, 2, causal=True)[[0, 1], [4, 2]]
    actual = ops.single_query_attention(query[[0, 1], [4, 2]], key, value, 2, lengths=torch.tensor([5, 3]))
    assert relative_error(actual, rows) < 1e-13


def test_compiled_without_a_break() -> None:
    torch.manual_seed(0)
    query, key, value = drawn(3, 8), drawn(3, 7, 8), drawn(3, 7, 8)
    lengths = torch.tensor([7, 1, 4])
    compiled = torch.compile(ops.single_query_attention, fullgraph=True, backend="aot_eager")
    expected = ops.single_query_attention(query, key, value, 2, lengths=lengths)
    assert relative_error(compiled(query, key, value, 2, lengths=lengths), expected) < 1e-13


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"query": torch.ones(2, 8, dtype=torch.long)}, TypeError, r"query\): got torch.int64"),
        ({"query": torch.ones(2, 7)}, ValueError, r"query\): got shape \(2, 7\).*num_heads = 2"),
        ({"key": torch.ones(2, 5, 6)}, ValueError, r"key\): got shape \(2, 5, 6\), expected \[2, N, 8\]"),
        ({"value": torch.ones(2, 4, 8)}, ValueError, r"value\): got shape \(2, 4, 8\)"),
        ({"key": torch.ones(3, 5, 8), "value": torch.ones(3, 5, 8)}, ValueError, r"key\): got shape \(3, 5, 8\)"),
        ({"lengths": torch.tensor([5])}, ValueError, r"lengths\): got shape \(1,\), expected \[2\]"),
        (
            {"lengths": torch.tensor([5, 5]), "cu_seqlens": torch.tensor([0, 5, 10])},
            ValueError,
            "got lengths and cu_seqlens",
        ),
    ],
)
def test_wrong_arguments(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"query": torch.ones(2, 8), "key": torch.ones(2, 5, 8), "value": torch.ones(2, 5, 8)} | changes
    with pytest.raises(error, match=f"single_query_attention.*{message}"):
        ops.single_query_attention(**arguments, num_heads=2)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("offsets", [[0, 5, 9], [0, 7, 5], [0, 10, 10], [0, 0, 10]])
def test_wrong_offsets(backend: str, offsets: list[int]) -> None:
    packed = torch.ones(10, 8)
    with clipfast.backend(backend), pytest.raises(ValueError, match=r"single_query_attention\(cu_seqlens\): got"):
        ops.single_query_attention(torch.ones(2, 8), packed, packed, 2, cu_seqlens=torch.tensor(offsets))
