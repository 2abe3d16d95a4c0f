"""clipfast.accelerate on open_clip's SigLIP, CLIPA, MetaCLIP 2 and bigG: in their own widths, a few blocks deep."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import open_clip
import pytest
import timm
import torch
from acceleration import assert_close, assert_same_gradients, counted, loss_of
from configurations import VOCABULARY, texts_for
from open_clip import timm_model
from oracle import relative_error
from torch import Tensor, nn

import clipfast
from clipfast.modules.pooling import AttentionPool

# blocks of each tower; a patch is as large as theirs, a picture has four by three
NAMES = {
    "ViT-B-16-SigLIP": 2,
    "ViT-SO400M-14-SigLIP": 2,
    "ViT-B-16-SigLIP2": 2,
    "ViT-L-14-CLIPA": 2,
    "ViT-H-14-worldwide": 1,
}

POOL = AttentionPool.forward


def made(name: str, layers: int) -> nn.Module:
    config = copy.deepcopy(open_clip.get_model_config(name))
    custom = config.pop("custom_text", False)
    vision, text = config["vision_cfg"], config["text_cfg"]
    create, patch = timm.create_model, vision.get("patch_size", 14 if "-14-" in name else 16)
    vision |= {"image_size": (4 * patch, 3 * patch)}
    if "timm_model_name" not in vision:
        vision["layers"] = layers
    text |= {"layers": layers, "vocab_size": VOCABULARY}

    def small(name: str, **options: Any) -> nn.Module:
        return create(name, **options, depth=layers, img_size=(4 * patch, 3 * patch))

    torch.manual_seed(0)
    with mock.patch.object(timm_model.timm, "create_model", small):
        model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config)
    noise = 0.02 * torch.randn(1_000_003)  # for all of them: drawing more takes longer than the test
    with torch.no_grad():
        for p in model.parameters():
            # from where they start: what begins as zeros or ones tells nothing
            p.add_(noise.repeat(-(-p.numel() // len(noise)))[: p.numel()].view_as(p))
    return model


def call(model: nn.Module, images: Tensor, tokens: Tensor) -> list[Tensor]:
    return [model.encode_image(images), model.encode_text(tokens), model.logit_scale]


@pytest.mark.parametrize("name", [*NAMES, pytest.param("ViT-bigG-14", marks=pytest.mark.exhaustive)])
def test_features_and_gradients(name: str) -> None:
    original = made(name, NAMES.get(name, 1))
    rounded, served = copy.deepcopy(original), copy.deepcopy(original).double()
    clipfast.accelerate(served)
    assert not clipfast.acceleration(served).left_alone
    exact = original.double()
    images = torch.randn(2, 3, *exact.visual.image_size, dtype=torch.float64)
    tokens = texts_for(exact)[:2]
    with counted() as towers, mock.patch.object(AttentionPool, "forward", autospec=True) as pools:
        pools.side_effect = POOL
        outputs = call(served, images, tokens)
    assert len(towers) == 2
    assert pools.call_count == ("SigLIP" in name)
    expected = call(exact, images, tokens)
    assert_close(outputs, expected, 1e-10)
    loss_of(outputs).backward()
    loss_of(expected).backward()
    assert_same_gradients(served, exact, 1e-10)
    with torch.no_grad():
        by_open_clip = call(rounded, images.float(), tokens)
    clipfast.accelerate(rounded)
    # with packed weights where the library has them, and by the modules
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            for a, o, e in zip(call(rounded, images.float(), tokens), by_open_clip, expected, strict=True):
                assert a.dtype == torch.float32
                # bigG's own error is more than half of that
                assert relative_error(a, e) <= max(2e-6, 2 * relative_error(o, e) * (name == "ViT-bigG-14"))
