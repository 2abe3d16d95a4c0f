"""The ResNet tower's options and errors; what it computes is compared with open_clip in tests/models."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from torch import Tensor, nn

import clipfast


def small_resnet(**changes: object) -> clipfast.ModifiedResNet:
    torch.manual_seed(0)
    sizes = {"layers": (1, 2, 1, 1), "output_dim": 24, "heads": 4, "image_size": 64, "width": 8}
    model = clipfast.ModifiedResNet(**(sizes | changes)).double()
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            # they start at zero, which would hide the residual branches
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 64, 64, dtype=torch.float64)


def test_maps_halve_from_stage_to_stage() -> None:
    maps = small_resnet().forward_intermediates(images())["image_intermediates"]
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (32, 16, 16), (64, 8, 8), (128, 4, 4), (256, 2, 2)]


def test_features_are_the_pooled_last_map() -> None:
    model, x = small_resnet().eval(), images()
    assert relative_error(model.attnpool(model.forward_features(x)), model(x)) < 1e-13
    assert model(x).shape == (3, 24)


def test_gradient_checkpointing_changes_no_gradient_and_no_statistic() -> None:
    x = images()
    results = []
    for enable in (False, True):
        model = small_resnet()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        results.append([p.grad for p in model.parameters()] + [b.clone() for b in model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradient_checkpointing_computes_blocks_again() -> None:
    model = small_resnet()
    model.set_grad_checkpointing()
    calls = []
    model.layer2[1].register_forward_pre_hook(lambda *_: calls.append(1))
    model(images()).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (1, 2, 3)}, r"layers.*\(1, 2, 3\).*four numbers"),
        ({"image_size": 60}, "image_size.*60.*multiple of 32"),
        ({"heads": 7}, "heads.*got 7 for width 256"),
    ],
)
def test_wrong_sizes(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_resnet(**changes)


def test_wrong_images() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 32, 32\), expected \[B, 3, 64, 64\]"):
        small_resnet()(torch.zeros(2, 3, 32, 32, dtype=torch.float64))
