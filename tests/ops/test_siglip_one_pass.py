"""SigLIP's gradients come with its loss: which kernels run, and that what comes backwards counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive_oracle import TILED
from torch import Tensor

from clipfast import ops
from clipfast.ops import contrastive_kernels, contrastive_loss


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Write down which of a loss' kernels run."""
    calls: list[str] = []

    def watched(kernels: contrastive_kernels.Kernels) -> contrastive_kernels.Kernels:
        def watch(name: str, kernel: Any) -> Any:
            return lambda *arguments: calls.append(name) or kernel(*arguments)

        return kernels._make(watch(name, kernel) for name, kernel in kernels._asdict().items())

    chunked, native = contrastive_kernels.chunked, contrastive_loss.__globals__["native_kernels"]
    monkeypatch.setattr(contrastive_kernels, "chunked", watched(chunked))
    monkeypatch.setitem(contrastive_loss.__globals__, "native_kernels", lambda image: watched(native(image)))
    return calls


def features(dtype: torch.dtype = torch.float32, batch: int = 70) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(2, batch, 24, generator=generator), dim=-1).to(dtype)
    return [t.clone().requires_grad_() for t in x]


@pytest.mark.parametrize("backend", TILED)
def test_logits_are_formed_once(backend: str, ran: list[str]) -> None:
    image, text = features()
    with ops.backend(backend):
        ops.siglip_loss(image, text, 10.0, logit_bias=-3.0).backward()
        assert ran == ["siglip_gradients"]
        ran.clear()
        with torch.no_grad():
            alone = ops.siglip_loss(image, text, 10.0, logit_bias=-3.0)
        frozen = ops.siglip_loss(image.detach(), text.detach(), 10.0, logit_bias=-3.0)
        assert ran == ["siglip_statistics"] * 2
        assert not frozen.requires_grad
        ran.clear()
        # every row's loss may get a weight of its own
        ops.siglip_loss(image, text, 10.0, logit_bias=-3.0, reduction="none").sum().backward()
        assert ran == ["siglip_statistics", "siglip_gradients"]
        learned = ops.siglip_loss(image, text, 10.0, logit_bias=-3.0)
    torch.testing.assert_close(alone, learned.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", TILED)
def test_what_comes_backwards_counts(backend: str, dtype: torch.dtype) -> None:
    # a loss' scale: without it, float16 gradients of a mean would be zeros
    factor, size = 2.0**16, 2.0**-12
    results = []
    for name in ("reference", backend):
        image, text = features(dtype, 300)
        scale = torch.tensor(10.0, requires_grad=True)
        with ops.backend(name):
            (factor * size * ops.siglip_loss(image, text, scale, logit_bias=-30.0)).backward()
        results.append([x.grad.double() for x in (image, text, scale)])
    for reference, found in zip(*results, strict=True):
        allowed = 2 * torch.finfo(dtype).eps * reference.abs().max()
        assert (found - reference).abs().max() <= allowed
        assert found.abs().max() > 0


@pytest.mark.parametrize("backend", TILED)
def test_one_side_may_be_frozen(backend: str) -> None:
    image, text = features()
    found = []
    for name in ("reference", backend):
        with ops.backend(name):
            loss = ops.siglip_loss(image.detach(), text, 10.0, logit_bias=-3.0)
            found.append(torch.autograd.grad(loss, text)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
