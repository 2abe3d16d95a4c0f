"""clipfast.ViT computes what timm's CLIP ViTs compute from the same weights: outputs and gradients."""

from __future__ import annotations

import pytest
import timm
import tiny
import torch
from oracle import relative_error
from torch import nn

import clipfast
from clipfast.models.key_layouts import to_openai

NAMES = {"vit_base_patch32_clip_224": "none", "vit_base_patch32_clip_quickgelu_224": "quick"}


def compare_fp64(rival: nn.Module, vit: clipfast.ViT) -> None:
    clipfast.load_weights(vit.double(), rival.double().state_dict())
    images = torch.randn(2, 3, *vit.image_size, dtype=torch.float64)
    expected, actual = rival(images), vit(images)
    assert relative_error(actual, expected) <= 1e-10
    weights = torch.randn_like(expected)
    (weights * expected).sum().backward()
    (weights * actual).sum().backward()
    own = dict(vit.named_parameters())
    # CLIP's projection has no bias, so timm's gets a gradient that has no place
    theirs = to_openai({k: p.grad for k, p in rival.named_parameters() if k != "head.bias"})
    for key, value in theirs.items():
        assert relative_error(own.pop(key.removeprefix("visual.")).grad, value) <= 1e-10, key
    assert not own


def b32(name: str) -> tuple[nn.Module, clipfast.ViT]:
    torch.manual_seed(0)
    rival = tiny.drawn(timm.create_model(name, num_classes=512))
    nn.init.zeros_(rival.head.bias)
    return rival, clipfast.ViT(approximate=NAMES[name])


@pytest.mark.parametrize("name", NAMES)
def test_b32_fp64_outputs_and_gradients(name: str) -> None:
    compare_fp64(*b32(name))


@pytest.mark.parametrize("name", NAMES)
def test_b32_fp32_outputs(name: str) -> None:
    rival, vit = b32(name)
    clipfast.load_weights(vit, rival.state_dict())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        assert relative_error(vit(images), rival(images)) <= 2e-6


@pytest.mark.parametrize("head", ["none", "without bias", "zero bias"])
@pytest.mark.parametrize("name", NAMES)
def test_heads(name: str, head: str) -> None:
    torch.manual_seed(0)
    rival = tiny.timm_vit(0 if head == "none" else 32, name=name)
    if head == "without bias":
        rival.head = nn.Linear(64, 32, bias=False)
    compare_fp64(rival, clipfast.ViT(32, 16, 64, 2, 2, output_dim=rival.num_classes or None, approximate=NAMES[name]))


def test_fp64_tokens() -> None:
    rival = tiny.timm_vit(0).double()
    vit = clipfast.load_weights(clipfast.ViT(32, 16, 64, 2, 2, output_dim=None).double(), rival.state_dict())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(vit.forward_features(images), rival.forward_features(images)) <= 1e-10
