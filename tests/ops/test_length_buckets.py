"""Packed sequences in buckets and by ``varlen_attn``: what is chosen, exactness, and how many calls there are.

The CPU computes what a card would; how many launches a card makes is counted in ``tests/support/host_path_cases.py``.
"""

from __future__ import annotations

import importlib
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast.ops import attention_packed, attention_torch, attention_varlen, length_buckets
from clipfast.ops.length_buckets import Bucket, choose, make

# the function has the file's name
single_query = importlib.import_module("clipfast.ops.single_query_attention")

CPU = torch.device("cpu")
LENGTHS = {
    "in order": [1, 2, 2, 7, 8, 30, 31],
    "mixed": [30, 1, 8, 2, 31, 7, 2],
    "with empty ones": [0, 5, 0, 3, 5, 0],
    "equal": [5, 5, 5],
    "one": [6],
}


def ragged(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def captions(count: int, low: int, high: int) -> Tensor:
    return torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(count))


@pytest.fixture
def small_buckets_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_buckets, "_WORTH", 4)


@pytest.mark.usefixtures("small_buckets_pay")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_attention(lengths: list[int], causal: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 2, 16, dtype=torch.float64, generator=generator)
    cotangent = torch.randn(sum(lengths), 32, dtype=torch.float64, generator=generator)

    def run(attend: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.to(dtype).requires_grad_()
        out = attend(leaf, causal, ragged(lengths), 0.3)
        return out, *torch.autograd.grad(out, leaf, cotangent.to(dtype))

    found = run(attention_packed._in_buckets, dtype)
    reference, exact = (run(attention_torch.reference, d) for d in (dtype, torch.float64))
    for what, *three in zip(("output", "gradient"), found, reference, exact, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(three[0], three[2], rtol=1e-12, atol=1e-12)
        else:
            assert_as_exact_as_reference(*three, what)


@pytest.mark.usefixtures("small_buckets_pay")
@pytest.mark.parametrize("lengths", [LENGTHS[name] for name in ("in order", "mixed", "equal", "one")])
def test_one_query_a_sequence(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    tensors = [torch.randn(n, 2, 16, generator=generator).double() for n in (len(lengths), total, total)]

    def run(attend: Any) -> tuple[Tensor, ...]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = attend(*leaves)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    offsets = ragged(lengths)
    found = run(lambda *three: single_query._in_buckets(*three, offsets, 0.3))
    expected = run(lambda *three: single_query._reference(*three, None, offsets, 0.3))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_nothing_of_the_padding_gets_into_a_gradient() -> None:
    """Padded queries' gradients would flow into real keys, were they not zero."""
    lengths = [2, 9]
    qkv = torch.randn(11, 3, 1, 8, dtype=torch.float64, requires_grad=True)
    alone = torch.autograd.grad(
        attention_packed._in_buckets(qkv[:2], True, ragged([2]), 1.0).sum(), qkv, retain_graph=True
    )[0]
    beside = torch.autograd.grad(attention_packed._in_buckets(qkv, True, ragged(lengths), 1.0)[:2].sum(), qkv)[0]
    torch.testing.assert_close(beside, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("count", "low", "high"), [(256, 11, 31), (4096, 5, 77), (16, 5, 77), (1, 9, 9)])
def test_a_few_calls_whatever_the_lengths(count: int, low: int, high: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, lengths = [], captions(count, low, high)
    sdpa = F.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args[0].shape)
        return sdpa(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    attention_packed._in_buckets(torch.zeros(int(lengths.sum()), 3, 1, 1), True, ragged(lengths.tolist()), 1.0)
    assert len(calls) <= length_buckets.MOST
    assert sum(shape[0] for shape in calls) == count
    padded = sum(shape[0] * shape[2] for shape in calls)
    assert padded <= 1.25 * int(lengths.sum()) + length_buckets._WORTH


def test_buckets_are_the_best_of_their_number() -> None:
    lengths, counts = torch.tensor([1, 3, 4, 9, 10, 30, 31]), torch.tensor([5, 1, 40, 2, 300, 7, 90])
    total = int(counts.sum())

    def cost(bounds: tuple[int, ...]) -> int:
        edges = [0, *(b + 1 for b in bounds), len(lengths)]
        padded = sum(int(lengths[b - 1] * counts[a:b].sum()) for a, b in pairwise(edges))
        return padded + length_buckets._WORTH * len(bounds)

    chosen = choose(lengths, counts)
    bounds = tuple(lengths.tolist().index(length) for length, _ in chosen[:-1])
    assert sum(count for _, count in chosen) == total
    assert cost(bounds) == min(cost(c) for n in range(length_buckets.MOST) for c in combinations(range(6), n))
    assert len(bounds) >= 1


def test_lengths_without_end_are_bounded_by_some_of_them() -> None:
    lengths = torch.randint(1, 900, (3000,), generator=torch.Generator().manual_seed(0))
    made = make(lengths, CPU)
    assert len(made.sizes) == length_buckets.MOST
    assert sum(b.count for b in made.sizes) == 3000
    assert made.sizes[-1].length == int(lengths.max())
    assert torch.equal(made.pad[made.unpad], torch.arange(int(lengths.sum())))


def test_buckets_are_made_in_host_memory_whatever_the_default_device_is() -> None:
    lengths = torch.tensor([5, 3, 0, 9])
    with torch.device("meta"):
        made = make(lengths, CPU)
    assert torch.equal(made.pad[made.unpad], torch.arange(17))
    assert made.lengths.tolist() == [3, 5, 9]
    assert made.sequences[0].tolist() == [1, 0, 3]


@pytest.mark.slow
def test_varlen_attn_is_an_operator_to_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told the longest sequence, which is data."""
    calls = []

    def called(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        offsets, _, longest, _, causal, scale = rest
        calls.append(longest)
        qkv = torch.stack([query, key, value], dim=1)
        return attention_torch.reference(qkv, causal, offsets, scale).unflatten(-1, (2, -1))

    monkeypatch.setattr(attention_varlen, "_call", called)
    torch._dynamo.reset()
    compiled = torch.compile(attention_varlen.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ([3, 4], [2, 9, 1]):
        qkv = torch.randn(sum(lengths), 3, 2, 8, dtype=torch.float64)
        results = []
        for attend in (compiled, attention_torch.reference):
            leaf = qkv.clone().requires_grad_()
            out = attend(leaf, True, ragged(lengths), 0.5)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert calls[-1] == max(lengths)


def test_gradients_of_gradients() -> None:
    qkv = torch.randn(6, 3, 2, 2, dtype=torch.float64, requires_grad=True)

    def packed(x: Tensor) -> Tensor:
        # SDPA's explicit form has second derivatives
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return attention_packed._in_buckets(x, True, ragged([2, 1, 3]), 0.5)

    assert torch.autograd.gradcheck(packed, qkv)
    assert torch.autograd.gradgradcheck(packed, qkv)


def test_company_does_not_count_where_results_may_not_depend_on_it() -> None:
    qkv = torch.randn(40, 3, 2, 16)

    def first(lengths: list[int]) -> Tensor:
        return attention_packed._in_buckets(qkv[: sum(lengths)], True, ragged(lengths), 0.25)[:5]

    with clipfast.deterministic():
        assert make(torch.tensor([5, 3, 9, 8, 1]), CPU).sizes == [
            Bucket(1, 1, True),
            Bucket(4, 1, False),
            Bucket(8, 2, False),
            Bucket(16, 1, False),
        ]
        alone = first([5])
        for company in ([1], [7, 8], [35], [5] * 7):
            assert torch.equal(first([5, *company]), alone)
    assert [b.length for b in make(torch.tensor([5, 3, 9]), CPU).sizes] == [9]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "float32 is not served"),
        ({"head_dim": 36}, "head_dim 36 is not served"),
        ({"head_dim": 256}, "head_dim 256 is not served"),
        ({"packed": False}, "packed sequences alone"),
        ({"deterministic": True}, "atomics"),
        ({"capability": (7, 5)}, "compute capability 8.0, the card has 7.5"),
        ({"flash": False}, "without FlashAttention"),
        ({"there": False}, "PyTorch has no varlen_attn"),
        ({}, None),
    ],
    ids=str,
)
def test_what_varlen_attn_serves(change: dict[str, Any], reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, head_dim = change.get("dtype", torch.bfloat16), change.get("head_dim", 64)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: change.get("capability", (9, 0)))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: change.get("flash", True))
    if "there" in change:
        monkeypatch.setattr(attention_varlen, "_operator", lambda: None)
        monkeypatch.setattr(attention_varlen, "_function", lambda: None)
    offsets = ragged([3, 4]) if change.get("packed", True) else None
    unavailable = attention_varlen._unavailable
    monkeypatch.setattr(attention_varlen, "_unavailable", lambda *where: unavailable("cuda", 0))
    qkv = torch.zeros(7, 3, 2, head_dim, dtype=dtype)
    with clipfast.deterministic(change.get("deterministic", False)):
        refusals = [
            attention_varlen.refusal(qkv, True, offsets, head_dim**-0.5),
            attention_varlen.single_query_refusal(qkv[:2, 0], qkv[:, 1], qkv[:, 2], None, offsets, head_dim**-0.5),
        ]
    assert [r if r is None or reason is None else reason in r for r in refusals] == [reason and True] * 2


def test_explain_names_both_of_pytorchs() -> None:
    said = clipfast.explain("attention", torch.zeros(7, 3, 2, 16), 2, causal=True, cu_seqlens=ragged([3, 4]))
    assert "attention: torch (scaled_dot_product_attention" in said
    assert (
        "not torch (PyTorch's FlashAttention for sequences of any lengths, varlen_attn): float32 is not served" in said
    )
