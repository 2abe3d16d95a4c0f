"""clipfast.accelerate on timm's vision transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import tiny
import torch
from acceleration import Case, assert_close, counted
from acceleration_checks import (
    COMMON,
    RARE,
    check_checkpointed_gradients,
    check_dropout,
    check_hooked,
    check_packed_inference,
    parametrize,
)
from torch import nn

import clipfast

SIZES = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 32}


def images(dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)}


def vit(name: str = "vit_base_patch32_clip_224", **changes: Any) -> nn.Module:
    return tiny.drawn(timm.create_model(name, **(SIZES | changes)))


def without_head_bias() -> nn.Module:
    model = vit()
    model.head = nn.Linear(64, 32, bias=False)
    return model


SIGLIP = "vit_base_patch16_siglip_224"
CLIP = Case("CLIP", vit, images)
CASES = [
    CLIP,
    Case("quickgelu", partial(vit, "vit_base_patch32_clip_quickgelu_224"), images),
    Case("no head", partial(vit, num_classes=0), images),
    Case("no head bias", without_head_bias, images),
    Case("no norm before", partial(vit, "vit_base_patch16_224"), images),
    Case("mean of tokens", partial(vit, global_pool="avg"), images),
    Case("registers", partial(vit, reg_tokens=2, no_embed_class=True), images),
    Case("any image size", partial(vit, dynamic_img_size=True), images),
    Case("patch dropout", partial(vit, patch_drop_rate=0.5), images),
    Case("pooled by attention", partial(vit, SIGLIP), images),
    Case("pooled behind the norm", partial(vit, global_pool="avg", fc_norm=False, pool_include_prefix=True), images),
    Case("layer scale", partial(vit, init_values=0.1, reg_tokens=1), images),
    Case("no biases", partial(vit, qkv_bias=False, proj_bias=False), images),
]


@parametrize(CASES, COMMON)
def test_accelerated(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([CLIP], (*RARE, check_checkpointed_gradients))
def test_accelerated_clip(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([c for c in CASES if c.name in ("pooled by attention", "layer scale", "no biases")], (check_hooked,))
def test_accelerated_hooked(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([c for c in CASES if c.name in ("pooled by attention", "layer scale")], (check_packed_inference,))
def test_accelerated_packed(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_tokens_are_served() -> None:
    model, original = CLIP.pair()
    x = images(torch.float64)["x"]
    with counted() as calls:
        assert_close([model.forward_features(x)], [original.forward_features(x)], 1e-12)
    assert len(calls) == 1


def test_the_original_serves_masks() -> None:
    model, original = CLIP.pair()
    x = images(torch.float64)["x"]
    with counted() as calls:
        assert_close([model(x, is_causal=True)], [original(x, is_causal=True)], 0)
        mask = torch.zeros(5, 5, dtype=torch.float64)
        assert_close([model(x, attn_mask=mask)], [original(x, attn_mask=mask)], 0)
        torch.jit.trace(model, (x,), check_trace=False)
    assert not calls


def test_dropout_in_training_runs_the_original() -> None:
    check_dropout(Case("", partial(vit, drop_path_rate=0.5), images))


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("vit_base_patch32_clip_224", {"qk_norm": True}, "block 0's q_norm"),
        ("vit_base_patch32_clip_224", {"scale_mlp_norm": True}, "block 0's LayerNorm in its MLP"),
        ("deit_tiny_distilled_patch16_224", {}, "its forward_head is not that of timm's VisionTransformer"),
        ("vit_base_patch16_rpn_224", {}, "block 0 is a timm.*expected timm's Block"),
    ],
)
def test_refused_by_name(name: str, changes: dict[str, Any], reason: str) -> None:
    model = vit(name, **changes)
    before = type(model), list(model.__dict__)
    with pytest.raises(ValueError, match=f"(?s)nothing in it that can be accelerated.*the model: .*{reason}"):
        clipfast.accelerate(model)
    assert (type(model), list(model.__dict__)) == before


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="got a timm.models.resnet.ResNet with nothing in it"):
        clipfast.accelerate(timm.create_model("resnet18"))


def test_an_unknown_version_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clipfast.models.accelerate_timm", None)
    with pytest.raises(ValueError, match=f"\n  the model: timm {timm.__version__} is not known") as caught:
        clipfast.accelerate(vit())
    assert str(caught.value).count("\n") == 1
