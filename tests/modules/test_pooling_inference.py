"""MAP pooling without gradients: keys and values by packed weights, as exact as the modules, and never stale."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_cases import DTYPES, skip_if_unable
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast.modules import inference
from clipfast.modules.pooling import AttentionPool


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each product was the op library's."""
    served, linear = [], inference.linear

    def watched(*arguments: object, **options: object) -> Tensor | None:
        result = linear(*arguments, **options)
        served.append(result is not None)
        return result

    monkeypatch.setattr(inference, "linear", watched)
    return served


def pool_of(dtype: torch.dtype) -> AttentionPool:
    torch.manual_seed(0)
    pool = AttentionPool(288, 4, 4304 / 1152, "tanh").eval()
    torch.nn.init.normal_(pool.attn.in_proj_bias)
    return pool.to(dtype)


@pytest.mark.parametrize("offsets", [None, [0, 1, 40, 66]], ids=["images", "packed"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_the_modules(dtype: torch.dtype, offsets: list[int] | None, packed: list[bool]) -> None:
    skip_if_unable("native", dtype)
    pool = pool_of(dtype)
    x = torch.randn(66, 288).to(dtype) if offsets else torch.randn(3, 22, 288).to(dtype)
    cu_seqlens = None if offsets is None else torch.tensor(offsets)
    with torch.no_grad():
        fast = pool(x, cu_seqlens)
        assert packed == [True]
        with clipfast.backend("reference"):
            exact = copy.deepcopy(pool).double()(x.double(), cu_seqlens)
    reference = pool(x, cu_seqlens)  # with gradients, nothing is packed
    assert packed == [True, False, False]
    assert_as_exact_as_reference(fast, reference, exact, "pooled")


def test_what_is_written_counts(packed: list[bool]) -> None:
    skip_if_unable("native", torch.float32)
    pool, x = pool_of(torch.float32), torch.randn(2, 9, 288)
    with torch.no_grad():
        before = pool(x)
        pool.attn.in_proj_bias[-288:] += 1
        after = pool(x)
        pool.attn.in_proj_weight[-288:] *= 2
        last = pool(x)
        assert packed == [True] * 3
    assert not torch.equal(before, after)
    assert not torch.equal(after, last)
    torch.testing.assert_close(last, pool(x), atol=2e-6, rtol=2e-6)
