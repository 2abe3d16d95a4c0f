"""clipfast.accelerate on torchvision's vision transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from acceleration import Case
from acceleration_checks import COMMON, RARE, check_dropout, parametrize
from torch import nn
from torchvision.models import resnet18, vit_b_16
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import clipfast


def images(dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)}


def vit(**changes: Any) -> nn.Module:
    model = tiny.drawn(VisionTransformer(32, 16, 2, 2, 64, 256, num_classes=10, **changes))
    # it starts at zero, which would hide everything before it
    nn.init.normal_(model.heads.head.weight)
    return model


CASES = [
    Case("ViT", vit, images),
    Case("representation", partial(vit, representation_size=24), images),
    # strides of 2 and 1×1: 16 × 16 pixels' patches need 4 convolutions
    Case("convolutional stem", partial(vit, conv_stem_configs=[ConvStemConfig(8, 3, 2)] * 4), images),
]


@parametrize(CASES, COMMON)
def test_accelerated(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize(CASES[:1], RARE)
def test_accelerated_vit(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_vit_b_16_is_known() -> None:
    with torch.device("meta"):
        model = clipfast.accelerate(vit_b_16())
    assert str(clipfast.acceleration(model)) == "accelerated: the model"


@pytest.mark.parametrize("changes", [{"dropout": 0.1}, {"attention_dropout": 0.1}])
def test_dropout_in_training_runs_the_original(changes: dict[str, float]) -> None:
    check_dropout(Case("", partial(vit, **changes), images))


def test_wrong_images_raise_as_in_the_original() -> None:
    model, _ = CASES[0].pair()
    with pytest.raises(AssertionError, match="Wrong image height"):
        model(torch.randn(2, 3, 48, 32, dtype=torch.float64))


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="got a torchvision.models.resnet.ResNet with nothing in it"):
        clipfast.accelerate(resnet18())
