"""Tiles of 16-bit features by tensor cores, with a stand-in for the operator that the CPU lacks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import LOSSES, compare
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.ops import contrastive_kernels, contrastive_products

DTYPES = [torch.bfloat16, torch.float16]
taken: list[torch.dtype] = []


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_kernels, "ROWS", 48)
    monkeypatch.setattr(contrastive_kernels, "COLUMNS", 64)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the CPU multiply as ``torch.mm(out_dtype=torch.float32)`` does."""

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype, "the operator takes factors of one dtype"
        assert a.dtype in DTYPES
        taken.append(a.dtype)
        return a.float() @ b.float()

    taken.clear()
    monkeypatch.setattr(contrastive_products, "takes", lambda features: features.dtype in DTYPES)
    monkeypatch.setattr(contrastive_products, "multiply", multiply)


def features(batch: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(batch, width, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(F.normalize(x, dim=-1).to(dtype) for x in (image, image + noise))


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("name", LOSSES)
def test_as_exact_as_the_reference(name: str, scale: float, dtype: torch.dtype) -> None:
    for batch, width in ((1, 32), (130, 48)):
        compare(name, "torch", *features(batch, width, dtype), scale)
    assert set(taken) == {dtype}
    compare(name, "torch", *features(130, 32, dtype), scale, reduction="none")


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_other_features_are_multiplied_as_before(name: str, dtype: torch.dtype) -> None:
    compare(name, "torch", *features(130, 32, dtype), 14.3)
    compare(name, "torch", *features(130, 32, dtype), 14.3, normalize=True)
    assert not taken


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_features_that_are_normalised_within_the_tiles_are_not_rounded(name: str, dtype: torch.dtype) -> None:
    image, text = features(130, 32, dtype)
    for by in (1.0, 40.0):
        compare(name, "torch", by * image, text, 14.3, normalize=True)
    assert set(taken) == {dtype}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_is_lost_against_float32(name: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    """The check of a kernel on a card takes these tiles for its reference: they may not become less exact."""
    image, text = features(200, 96, dtype)
    kernels, weight = contrastive_kernels.chunked, torch.ones(200)
    scale, bias = torch.tensor(20.0), torch.tensor(-3.0)

    def gradients() -> tuple[Tensor, ...]:
        if name == "siglip":
            return kernels.siglip_gradients(image, text, scale, bias, None, None, weight, 0)[1:]
        rows, columns, *_ = kernels.statistics(image, text, scale, None, None, 0)
        return kernels.gradients(image, text, scale, None, None, rows, columns, weight, weight, 0)

    before = gradients()
    request.getfixturevalue("tensor_cores")
    for found, expected in zip(gradients(), before, strict=True):
        # equal but for the last digit of some results
        step = torch.finfo(dtype).eps if found.dim() else 1e-5
        assert ((found - expected).abs() <= step * expected.abs() + 2.0**-15 * expected.abs().max()).all()
        assert found.dim() == 0 or (found == expected).double().mean() > 0.98


@pytest.mark.usefixtures("tensor_cores")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1.0, 1e6])
def test_weights_of_any_size(size: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = size * torch.rand(40, generator=generator)
    g = weights[:, None] * torch.rand(40, 30, generator=generator) ** 8
    x = torch.randn(30, 16, generator=generator).to(dtype)
    found = contrastive_products.weighted(g, x, contrastive_products.scale_of(x, (weights / 2,)))
    exact, most = g.double() @ x.double(), g.double().abs() @ x.double().abs()
    assert ((found - exact).abs() <= 2.0**-16 * most + 1e-45).all()


def test_no_weight_at_all(tensor_cores: None) -> None:
    image, text = features(70, 32, torch.float16)
    image = image.requires_grad_()
    with clipfast.backend("torch"):
        (0.0 * ops.contrastive_loss(image, text, 10.0)).backward()
    assert (image.grad == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_operator_of_a_card(dtype: torch.dtype) -> None:
    a, b = (torch.randn(64, 64, device="cuda").to(dtype) for _ in range(2))
    assert contrastive_products.takes(a)
    found = contrastive_products.multiply(a, b.T)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (a.double() @ b.double().T).float(), rtol=1e-5, atol=1e-4)
