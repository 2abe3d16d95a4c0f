"""The loss of a small batch on the CPU: what is kept between its two passes changes no bit of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import clipfast
from clipfast.ops import contrastive_kept, contrastive_kernels

pytestmark = pytest.mark.skipif(
    contrastive_kernels.native is None, reason=f"no op library: {contrastive_kernels.native_unavailable}"
)


def features(rows: int, columns: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    made = (torch.randn(n, width, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return [F.normalize(x, dim=1).to(dtype) for x in made]


# more and fewer than a tile's rows and columns, whole and not
@pytest.mark.parametrize(("rows", "columns"), [(1, 3), (130, 257), (640, 512)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("first_label", [0, 1, 600])
def test_products_that_are_kept_are_those_that_would_be_formed_again(rows, columns, dtype, first_label):
    image, text = features(rows, columns, 24, dtype)
    real = contrastive_kernels.accumulation_dtype(dtype)
    scale = torch.tensor(20.0, dtype=real)
    factors = torch.rand(rows, dtype=real) + 0.5, torch.rand(columns, dtype=real) + 0.5
    formed = contrastive_kernels.native.statistics(image, text, scale, *factors, first_label)
    *statistics, products = contrastive_kept.statistics(image, text, scale, *factors, first_label)
    for ours, theirs in zip(statistics, formed, strict=True):
        assert torch.equal(ours, theirs)
    torch.testing.assert_close(products, image.to(real) @ text.to(real).T, atol=1e-5, rtol=1e-5)
    before = products.clone()
    rest = (*formed[:2], torch.rand(rows, dtype=real), torch.rand(columns, dtype=real), first_label, True)
    formed = contrastive_kernels.native.gradients(image, text, scale, *factors, *rest)
    for _ in range(2):  # a graph that is kept goes backwards twice
        kept = contrastive_kept.gradients(products, image, text, scale, *factors, *rest)
        for ours, theirs in zip(kept, formed, strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(products, before)


@pytest.mark.parametrize(("most", "used"), [(0, False), (96 * 96, True), (96 * 96 - 1, False)])
def test_the_loss_is_the_same_with_and_without(monkeypatch, most, used):
    def gradients() -> list[Tensor]:
        leaves = [x.requires_grad_() for x in (*features(96, 96, 32, torch.float32), torch.tensor(30.0))]
        with clipfast.backend("native"):
            loss = clipfast.ops.contrastive_loss(*leaves)
        loss.backward()
        return [loss.detach(), *(x.grad for x in leaves)]

    calls = []
    real = contrastive_kept.gradients
    monkeypatch.setattr(contrastive_kept, "MOST", 0)
    expected = gradients()
    monkeypatch.setattr(contrastive_kept, "MOST", most)
    monkeypatch.setattr(contrastive_kept, "gradients", lambda *a: calls.append(1) or real(*a))
    for ours, theirs in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert bool(calls) == used


def test_a_loss_without_gradients_keeps_nothing(monkeypatch):
    monkeypatch.setattr(contrastive_kept, "statistics", None)
    with clipfast.backend("native"):
        clipfast.ops.contrastive_loss(*features(96, 96, 32, torch.float32), 30.0)


def test_the_ops_pass_opcheck_and_check_their_arguments():
    image, text = features(20, 30, 8, torch.float32)
    one = torch.tensor(1.0)
    torch.library.opcheck(contrastive_kept.statistics, (image, text, one, None, None, 0))
    *statistics, products = contrastive_kept.statistics(image, text, one, None, None, 0)
    arguments = (image, text, one, None, None, *statistics[:2], torch.ones(20), torch.ones(30), 0)
    torch.library.opcheck(contrastive_kept.gradients, (products, *arguments))
    for wrong in (products[:19], products.T.contiguous(), products.double(), products.T.contiguous().T):
        with pytest.raises(RuntimeError, match=r"products\): expected contiguous \[20, 30\]"):
            contrastive_kept.gradients(wrong, *arguments)
