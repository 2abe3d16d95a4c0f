"""What a user did to transformers' SigLIP and SigLIP 2 counts when they are accelerated."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import peft
import pytest
import tiny_towers as tiny
import torch
from acceleration import Case, assert_close, assert_same_gradients, counted, loss_of
from torch import nn
from transformers.models.siglip import modeling_siglip
from user_actions import scaled, wrapped, wrapped_method

import clipfast

pytestmark = pytest.mark.filterwarnings("ignore")

SIGLIP = Case("SigLIP", tiny.siglip, tiny.pair, towers=2)
SIGLIP_2 = Case("SigLIP 2", tiny.siglip2, tiny.patches_and_ids, towers=2)

PLACES = [
    "vision_model.head.attention",
    "vision_model.head.mlp.fc1",
    "vision_model.head",
    "vision_model.embeddings.patch_embedding",
    "vision_model.encoder.layers.1.self_attn.k_proj",
    "text_model.head",
    "text_model.final_layer_norm",
]


@pytest.mark.parametrize("how", ["patched", "hooked"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [SIGLIP, SIGLIP_2], ids=lambda case: case.name)
def test_what_a_user_does_counts(case: Case, place: str, how: str) -> None:
    model, original = case.pair()
    before = case.call(original)
    undo = []
    for m in (model, original):
        part = m.get_submodule(place)
        if how == "patched":
            part.forward = wrapped(part.forward)
            undo.append(partial(delattr, part, "forward"))
        else:
            handle = part.register_forward_hook(lambda module, args, output: scaled(output))
            undo.append(handle.remove)
    expected = case.call(original)
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-6
    with torch.no_grad():
        assert_close(case.call(model), expected, 1e-12)
    assert_close(case.call(model), expected, 1e-12)
    for take_back in undo:
        take_back()
    with counted() as calls:
        assert_close(case.call(model), before, 1e-12)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (modeling_siglip.SiglipEncoder, "forward"),
        (modeling_siglip.SiglipMultiheadAttentionPoolingHead, "forward"),
        (modeling_siglip.SiglipMLP, "forward"),
        (nn.functional, "multi_head_attention_forward"),
    ],
)
def test_patched_code_is_obeyed(module: Any, name: str) -> None:
    model, original = SIGLIP.pair()
    before = SIGLIP.call(original)
    method = getattr(module, name)
    changed = wrapped_method(method) if isinstance(module, type) else wrapped(method)
    with mock.patch.object(module, name, changed):
        expected = SIGLIP.call(original)
        assert_close(SIGLIP.call(model), expected, 1e-12)
        assert name in str(clipfast.acceleration(model))
    assert max((a - b).abs().max() for a, b in zip(expected, before, strict=True)) > 1e-6
    assert_close(SIGLIP.call(clipfast.accelerate(model)), before, 1e-12)


@pytest.mark.parametrize("case", [SIGLIP, SIGLIP_2], ids=lambda case: case.name)
def test_lora_stays_accelerated(case: Case) -> None:
    model, original = case.pair()
    adapted = [
        peft.get_peft_model(m, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)) for m in (model, original)
    ]
    generator = torch.Generator().manual_seed(0)
    for parts in zip(*(a.named_parameters() for a in adapted), strict=True):
        if "lora_" in parts[0][0]:
            values = 0.2 * torch.randn(parts[0][1].shape, generator=generator)
            for _, parameter in parts:
                parameter.data.copy_(values)
    for a in adapted:
        a.double()
    with counted() as calls:
        actual = case.call(model)
    assert len(calls) == 2
    expected = case.call(original)
    assert_close(actual, expected, 1e-12)
    loss_of(actual).backward()
    loss_of(expected).backward()
    assert_same_gradients(model, original)


def test_checkpointing_leaves_towers_accelerated() -> None:
    model, _ = SIGLIP_2.pair()
    # transformers hooks the embeddings for it
    model.gradient_checkpointing_enable()
    with counted() as calls:
        SIGLIP_2.call(model)
    assert len(calls) == 2


def test_a_changed_probe_counts() -> None:
    model, original = SIGLIP.pair()
    for m in (model, original):
        m.vision_model.head.probe = nn.Parameter(m.vision_model.head.probe.detach() * 2)
    with counted() as calls:
        assert_close(SIGLIP.call(model), SIGLIP.call(original), 1e-12)
    assert len(calls) == 2


def test_more_probes_are_left_to_the_original() -> None:
    model, original = SIGLIP.pair()
    for m in (model, original):
        probe = m.vision_model.head.probe.detach()
        m.vision_model.head.probe = nn.Parameter(torch.cat([probe, 2 * probe], dim=1))
    assert_close(SIGLIP.call(model), SIGLIP.call(original), 1e-12)
    assert "its probe is (1, 2, " in str(clipfast.acceleration(model))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation: str) -> None:
    for case in (SIGLIP, SIGLIP_2):
        model, original = case.pair()
        for m in (model, original):
            m.set_attn_implementation(implementation)
        with counted() as calls:
            # eager attention rounds its weights to float32
            assert_close(case.call(model), case.call(original), 1e-6 if implementation == "eager" else 1e-12)
        assert len(calls) == 2
