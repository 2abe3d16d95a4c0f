"""The op library's operators on AMX: their own source on software tiles.

A CPU with AMX runs them in `test_encoder.py` and `test_contrastive_loss.py` as every other, and here must give the very
bits that the software tiles give.
"""

from __future__ import annotations

import amx_on_cpu
import encoder_cases
import pytest
import torch
import torch.nn.functional as F
from amx_on_cpu import numbers
from contrastive_oracle import LOSSES, compare
from oracle import assert_as_exact_as_reference

from clipfast.ops import contrastive_kept, contrastive_kernels, library
from clipfast.ops.encoder import encode


@pytest.fixture
def software(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the op library's operators be those on software tiles."""
    operators = amx_on_cpu.operators()
    if "AVX512-BF16" in operators.why_no_amx():
        pytest.skip("this CPU lacks AVX512-BF16, which the kernels use beside the tiles")
    assert operators.why_no_amx() == ""
    monkeypatch.setattr(torch.ops, "clipfast", operators)
    monkeypatch.setattr(library, "unavailable", lambda: None)
    monkeypatch.setattr(
        contrastive_kernels,
        "native",
        contrastive_kernels.Kernels(*(getattr(operators, name) for name in contrastive_kernels._NAMES)),
    )
    monkeypatch.setattr(contrastive_kept, "statistics", operators.contrastive_statistics_and_products)
    monkeypatch.setattr(contrastive_kept, "gradients", operators.contrastive_gradients_of_products)
    # one that the operators cannot have would be an error
    monkeypatch.setenv("CLIPFAST_CPU_GEMM", "amx_bf16")


BFLOAT16 = torch.bfloat16
SEVERAL = (
    "images", "captions", "captions, all tokens", "a later token", "tanh", "quick", "heads of 80", "heads of 8",
    "heads of 72", "heads of 88", "heads of 104", "hidden 72", "as wide as ViT-B", "one layer", "one token",
    "read at the last, not causal",
)  # fmt: skip


@pytest.mark.usefixtures("software")
@pytest.mark.parametrize("name", SEVERAL)
def test_the_encoder_is_as_exact_as_the_reference(name: str) -> None:
    encoder_cases.check_exactness("native", BFLOAT16, *encoder_cases.CASES[name])


@pytest.mark.usefixtures("software")
@pytest.mark.parametrize("causal", [False, True])
def test_a_sequence_does_not_depend_on_its_neighbours(causal: bool) -> None:
    encoder_cases.check_company(BFLOAT16, causal)


@pytest.mark.usefixtures("software")
def test_threads_do_not_change_a_bit() -> None:
    """Two threads share the steps of five images, and take twelve of twenty-four each."""
    encoder, before = encoder_cases.encoder_of(BFLOAT16, layers=2), torch.get_num_threads()
    x, offsets = encoder_cases.tokens_of([50] * 24)
    x = x.to(BFLOAT16)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            all_of_them = encode(x, encoder, cu_seqlens=offsets, read=0)
            results += [all_of_them[:5], encode(x[:250], encoder, cu_seqlens=offsets[:6], read=0)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("software")
def test_nan_stays_in_its_sequence() -> None:
    x, offsets = encoder_cases.tokens_of([9, 9, 9])
    x[12, 3] = torch.nan
    out = encoder_cases.run("native", x.to(BFLOAT16), encoder_cases.encoder_of(BFLOAT16), offsets, 0)
    assert out.isnan().all(dim=1).tolist() == [False, True, False]
    assert not out[[0, 2]].isnan().any()


@pytest.mark.usefixtures("software")
@pytest.mark.parametrize(("rows", "terms", "columns"), [(1, 2, 1), (300, 3072, 40), (98, 588, 64)])
def test_a_linear_layer(rows: int, terms: int, columns: int) -> None:
    """Rows come in chunks; patches of 14 × 14 × 3 are no whole tiles."""
    x, weight = numbers(rows, terms, seed=1), numbers(columns, terms, seed=2)
    packed, bias = torch.ops.clipfast.pack_weight(weight), torch.arange(columns, dtype=torch.float32)
    found = torch.ops.clipfast.packed_linear(x, packed, bias, columns)
    exact = x.double() @ weight.double().T + bias
    assert_as_exact_as_reference(found, F.linear(x, weight, bias.to(BFLOAT16)), exact, "rows")
    alone = torch.ops.clipfast.packed_linear(x[rows // 2 :][:1].contiguous(), packed, bias, columns)
    assert torch.equal(alone[0], found[rows // 2])


@pytest.mark.usefixtures("software")
@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_are_as_exact_as_the_reference(name: str) -> None:
    for batch, width, scale in ((1, 32, 14.3), (70, 33, 100.0), (300, 128, 20.0)):
        generator = torch.Generator().manual_seed(batch)
        image, noise = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
        compare(name, "native", *(F.normalize(x, dim=-1).to(BFLOAT16) for x in (image, image + noise)), scale)


@pytest.mark.skipif(library.why_no_amx() is not None, reason=f"no AMX: {library.why_no_amx()}")
@pytest.mark.parametrize("causal", [False, True])
def test_this_cpus_tiles_give_the_same_bits(request: pytest.FixtureRequest, causal: bool) -> None:
    encoder = encoder_cases.encoder_of(BFLOAT16, 160, layers=2, causal=causal)
    x, offsets = encoder_cases.tokens_of([50, 7, 33, 77], 160)
    x = x.to(BFLOAT16)
    found = encoder_cases.run("native", x, encoder, offsets, None)
    request.getfixturevalue("software")
    assert torch.equal(found, encoder_cases.run("native", x, encoder, offsets, None))
