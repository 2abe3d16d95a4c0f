"""The packed encoder: every implementation as exact as plain PyTorch, whatever else is in the batch, and its errors."""

from __future__ import annotations

import threading

import pytest
import torch
from encoder_cases import (
    CASES,
    DTYPES,
    check_company,
    check_exactness,
    encoder_of,
    run,
    skip_if_unable,
    tokens_of,
)
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.ops.encoder import BlockWeights, PackedEncoder, encode


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("changes", "lengths", "read"), CASES.values(), ids=CASES.keys())
def test_as_exact_as_the_reference(
    backend: str, dtype: torch.dtype, changes: dict, lengths: list[int], read: int | None
) -> None:
    skip_if_unable(backend, dtype)
    check_exactness(backend, dtype, changes, lengths, read)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_does_not_depend_on_its_neighbours(dtype: torch.dtype, causal: bool) -> None:
    skip_if_unable("native", dtype)
    check_company(dtype, causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    skip_if_unable("native", dtype)
    encoder, (x, offsets) = encoder_of(dtype), tokens_of([50] * 5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("native", x.to(dtype), encoder, offsets, 0))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_calls_from_many_threads_at_once(backend: str) -> None:
    skip_if_unable(backend, torch.float32)
    encoder = encoder_of(torch.float32)
    inputs = [tokens_of([50, 7 + i], seed=i) for i in range(6)]
    expected = [run(backend, x, encoder_of(torch.float32), offsets, 0) for x, offsets in inputs]
    wrong: list[int] = []

    def serve(i: int) -> None:
        for _ in range(10):
            if not torch.equal(encode(inputs[i][0], encoder, cu_seqlens=inputs[i][1], read=0), expected[i]):
                wrong.append(i)

    with clipfast.backend(backend):
        threads = [threading.Thread(target=serve, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_the_workspace_is_bounded_and_given_back() -> None:
    skip_if_unable("native", torch.float32)
    encoder = encoder_of(torch.float32)
    ops.release_workspace()
    sizes = []
    for count in (20, 400):
        x, offsets = tokens_of([50] * count)
        run("native", x, encoder, offsets, 0)
        sizes.append(ops.release_workspace())
    # 512 tokens of 64: stream and read stream, normed, wide, queries; and what attention needs
    assert 0 < sizes[0] == sizes[1] < 3 * 2**20
    assert ops.release_workspace() == 0


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_nan_stays_nan_and_in_its_sequence(backend: str, dtype: torch.dtype, approximate: str) -> None:
    skip_if_unable(backend, dtype)
    x, offsets = tokens_of([9, 9, 9])
    x[12, 3] = torch.nan
    out = run(backend, x.to(dtype), encoder_of(dtype, approximate=approximate), offsets, 0)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e4])
@pytest.mark.parametrize("approximate", ["none", "tanh", "quick"])
def test_small_and_large_activations(scale: float, approximate: str) -> None:
    skip_if_unable("native", torch.float32)

    def scaled(dtype: torch.dtype) -> PackedEncoder:
        encoder = encoder_of(dtype, layers=1, approximate=approximate, rounded_to=torch.float32)
        (weight, bias), block = encoder.blocks[0].fc, encoder.blocks[0]
        changed = BlockWeights(block.ln_1, block.qkv, block.out, block.ln_2, (weight * scale, bias * scale), block.proj)
        return PackedEncoder([changed], 2, False, approximate, 1e-5)

    x, offsets = tokens_of([33])
    fast = run("native", x, scaled(torch.float32), offsets, None)
    reference = run("reference", x, scaled(torch.float32), offsets, None)
    exact = run("reference", x.double(), scaled(torch.float64), offsets, None)
    assert_as_exact_as_reference(fast, reference, exact, "tokens")


def test_no_sequences() -> None:
    encoder, offsets = encoder_of(torch.float32), torch.tensor([0])
    for backend in ("native", "torch", "reference"):
        skip_if_unable(backend, torch.float32)
        assert run(backend, torch.empty(0, 64), encoder, offsets, 0).shape == (0, 64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(6, 32)}, r"encode\(x\): got torch.float32 \(6, 32\).*\[total, 64\]"),
        ({"x": torch.ones(6, 64, dtype=torch.float64)}, "got torch.float64"),
        ({"cu_seqlens": torch.tensor([0, 3, 5])}, r"encode\(cu_seqlens\): got 0 … 5"),
        ({"cu_seqlens": torch.tensor([0, 0, 6])}, "leave no sequence empty"),
        ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.int32)}, "got torch.int32"),
        ({"read": 2}, r"encode\(read\): got 2, expected -1 to 1"),
        ({"read": -2}, r"encode\(read\): got -2"),
    ],
)
def test_wrong_arguments(changes: dict, message: str) -> None:
    arguments = {"x": torch.ones(6, 64), "cu_seqlens": torch.tensor([0, 2, 6]), "read": 0} | changes
    with pytest.raises(ValueError, match=message):
        encode(arguments.pop("x"), encoder_of(torch.float32), **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 80}, "width 80 is not served"),
        ({"width": 96, "heads": 32}, "head_dim 3 is not served"),
        ({"hidden": 43}, "hidden width 43 is not served"),
    ],
)
def test_refusals_name_the_reason(changes: dict, message: str) -> None:
    skip_if_unable("native", torch.float32)
    x, offsets = tokens_of([5], changes.get("width", 64))
    assert message in clipfast.explain("encoder", x, encoder_of(torch.float32, **changes), offsets, None)


def test_a_causal_encoder_is_read_at_the_last_token() -> None:
    with pytest.raises(ValueError, match="got 0, expected -1 or None for a causal encoder"):
        encode(torch.ones(6, 64), encoder_of(torch.float32, causal=True), cu_seqlens=torch.tensor([0, 6]), read=0)


def test_the_operator_checks_what_it_is_given() -> None:
    skip_if_unable("native", torch.float32)
    encoder, (x, offsets) = encoder_of(torch.float32), tokens_of([3, 3])
    weights = encoder.native_weights()

    def call(x: Tensor = x, offsets: Tensor = offsets, weights: list[Tensor] = weights, heads: int = 2) -> Tensor:
        return torch.ops.clipfast.encode(x, offsets, weights, heads, False, 0, 1e-5, 0)

    assert call().shape == (2, 64)
    for wrong in (
        {"x": x[:, :33].contiguous()},
        {"offsets": offsets.int()},
        {"offsets": torch.tensor([0, 7])},
        {"weights": weights[:-1]},
        {"weights": weights[::-1]},
        {"weights": []},
        {"heads": 3},
    ):
        with pytest.raises(RuntimeError, match="encode"):
            call(**wrong)
