"""Whole towers on the kernels against the reference, by the rule of docs/numerics.md, outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from interpreter import DEVICE
from oracle import assert_as_exact_as_reference
from torch import Tensor, nn

import clipfast

FORMS = ("none", "tanh", "quick")
DTYPES = (torch.float32,) if DEVICE == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


def vit(approximate: str) -> nn.Module:
    return clipfast.ViT(32, 16, 96, layers=2, heads=3, output_dim=32, approximate=approximate)


def text(approximate: str) -> nn.Module:
    sizes = {"context_length": 16, "vocab_size": 100, "width": 64, "layers": 2, "heads": 2, "output_dim": 32}
    return clipfast.TextTransformer(**sizes, approximate=approximate)


def images(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def tokens(dtype: torch.dtype) -> Tensor:
    ids = torch.randint(1, 98, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[torch.arange(3), torch.tensor([3, 15, 8])] = 99
    return ids.to(DEVICE)


def results(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    features = model(batch)
    weights = torch.linspace(-1, 1, features.numel(), dtype=torch.float64, device=DEVICE).view_as(features)
    features.backward(weights.to(features.dtype))
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters()}
    return {"features": features.detach()} | gradients


def drawn(tower, approximate: str, dtype: torch.dtype, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = tower(approximate).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.rand_like(parameter) - 0.1)
    return model


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tower", "batch"), [(vit, images), (text, tokens)], ids=["ViT", "TextTransformer"])
@pytest.mark.parametrize(
    ("approximate", "checkpointing"), [("none", False), ("tanh", False), ("quick", False), ("none", True)]
)
def test_towers(tower, batch, approximate: str, dtype: torch.dtype, checkpointing: bool) -> None:
    inputs = batch(dtype)
    exact = inputs.double() if inputs.is_floating_point() else inputs
    draws = {"fast": [], "reference": [], "oracle": []}
    # through many layers errors are noise, and the largest of few values is mostly luck: three models are held to the
    # rule as one
    for seed in range(3):
        model = drawn(tower, approximate, dtype, seed)
        with clipfast.backend("reference"):
            draws["reference"].append(results(model, inputs))
            draws["oracle"].append(results(copy.deepcopy(model).double(), exact))
        model.set_grad_checkpointing(checkpointing)
        with clipfast.backend("triton"):
            draws["fast"].append(results(model, inputs))
    for name in draws["fast"][0]:
        fast, reference, oracle = (torch.stack([result[name] for result in draws[kind]]) for kind in draws)
        assert_as_exact_as_reference(fast, reference, oracle, name)


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
def test_a_compiled_tower_is_one_graph() -> None:
    torch.manual_seed(0)
    model, inputs = vit("quick").to(DEVICE), images(torch.float32)
    with clipfast.backend("triton"):
        eager = results(model, inputs)
        compiled = torch.compile(model, fullgraph=True)
        for name, value in results(compiled, inputs).items():
            expected = eager[name.replace("_orig_mod.", "")]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
