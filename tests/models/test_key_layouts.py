"""Weights of every layout are told apart, and a way there and back is bitwise."""

from __future__ import annotations

from collections.abc import Callable

import open_clip
import pytest
import tiny
import torch
from torch import Tensor, nn

import clipfast
from clipfast.models.key_layouts import (
    detect_layout,
    from_openai,
    image_tower_of,
    is_from_openai,
    text_tower_of,
    to_openai,
)

SOURCES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "open_clip CLIP": ("openai", tiny.open_clip_clip),
    "open_clip CLIP with logit_bias": ("openai", lambda: tiny.open_clip_clip(init_logit_bias=-10.0)),
    "open_clip ResNet": ("openai", lambda: tiny.open_clip_clip(resnet=True)),
    "open_clip CustomTextCLIP": ("openai", lambda: tiny.open_clip_clip(custom_text=True)),
    "open_clip image tower": ("openai", lambda: tiny.open_clip_clip().visual),
    "open_clip ResNet tower": ("openai", lambda: tiny.open_clip_clip(resnet=True).visual),
    "open_clip text tower": ("openai", lambda: tiny.open_clip_clip(custom_text=True).text),
    "transformers model": ("transformers", tiny.transformers_clip),
    "transformers vision": ("transformers", lambda: tiny.transformers_vision(projection=False)),
    "transformers vision with projection": ("transformers", lambda: tiny.transformers_vision(projection=True)),
    "transformers text": ("transformers", lambda: tiny.transformers_text(projection=False)),
    "transformers text with projection": ("transformers", lambda: tiny.transformers_text(projection=True)),
    "timm with head": ("timm", tiny.timm_vit),
    "timm without head": ("timm", lambda: tiny.timm_vit(0)),
}


@pytest.fixture(params=[torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


def openai_state(dtype: torch.dtype = torch.float32, **kind: bool) -> dict[str, Tensor]:
    return tiny.cloned(tiny.open_clip_clip(**kind).to(dtype).state_dict())


@pytest.mark.parametrize("source", SOURCES)
def test_layouts_are_told_apart_by_their_keys(source: str) -> None:
    layout, make = SOURCES[source]
    assert detect_layout(make().state_dict()) == layout


@pytest.mark.parametrize("keys", [["fc.weight"], []])
def test_other_keys_are_of_no_known_layout(keys: list[str]) -> None:
    with pytest.raises(
        ValueError, match="no known layout.*expected those of openai, open_clip, transformers, timm, big_vision"
    ):
        to_openai({k: torch.ones(1) for k in keys})


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gets_openai_keys_and_no_others(source: str) -> None:
    whole = openai_state().keys() | openai_state(resnet=True).keys() | {"logit_bias"}
    assert to_openai(SOURCES[source][1]().state_dict()).keys() <= whole


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("source", ["open_clip CustomTextCLIP", "transformers vision", "timm with head"])
def test_prefixes_of_ddp_and_compile_are_taken_off(source: str, prefix: str) -> None:
    state = SOURCES[source][1]().state_dict()
    tiny.assert_same_state(to_openai({prefix + k: v for k, v in state.items()}), to_openai(state))


def test_custom_text_clip_differs_in_its_prefix_alone() -> None:
    state = openai_state()
    custom = open_clip.model.convert_to_custom_text_state_dict(state)
    assert custom.keys() != state.keys()
    tiny.assert_same_state(to_openai(custom), state)


def test_openai_sizes_and_old_buffers_are_left_out() -> None:
    state = openai_state()
    sizes = {k: torch.tensor(1) for k in ("input_resolution", "context_length", "vocab_size")}
    assert is_from_openai(state | sizes)
    assert not is_from_openai(state)
    tiny.assert_same_state(to_openai(state | sizes | {"attn_mask": torch.ones(16, 16)}), state)
    old = tiny.transformers_clip().state_dict()
    ids = {f"{tower}.embeddings.position_ids": torch.arange(5) for tower in ("text_model", "vision_model")}
    tiny.assert_same_state(to_openai(old | ids), to_openai(old))


def test_openai_to_transformers_and_back_is_bitwise(dtype: torch.dtype) -> None:
    state = openai_state(dtype)
    converted = from_openai(state, "transformers")
    assert all(v.is_contiguous() for v in converted.values())
    rival = tiny.transformers_clip().to(dtype)
    assert rival.load_state_dict(converted, strict=True)
    tiny.assert_same_state(to_openai(rival.state_dict()), state)


def test_transformers_to_openai_and_back_is_bitwise(dtype: torch.dtype) -> None:
    state = tiny.cloned(tiny.transformers_clip().to(dtype).state_dict())
    rival = tiny.open_clip_clip().to(dtype)
    rival.load_state_dict(from_openai(to_openai(state), "openai"), strict=True)
    tiny.assert_same_state(from_openai(to_openai(rival.state_dict()), "transformers"), state)


@pytest.mark.parametrize("num_classes", [32, 0])
def test_openai_to_timm_and_back_is_bitwise(dtype: torch.dtype, num_classes: int) -> None:
    state = {k: v for k, v in openai_state(dtype).items() if k.startswith("visual.")}
    if not num_classes:
        del state["visual.proj"]
    converted = from_openai(state, "timm")
    assert all(v.is_contiguous() for v in converted.values())
    rival = tiny.timm_vit(num_classes).to(dtype)
    rival.load_state_dict(converted, strict=True)
    tiny.assert_same_state(to_openai(rival.state_dict()), state)


@pytest.mark.parametrize("num_classes", [32, 0])
def test_timm_to_transformers_and_back_is_bitwise(dtype: torch.dtype, num_classes: int) -> None:
    state = tiny.cloned(tiny.timm_vit(num_classes).to(dtype).state_dict())
    converted = from_openai(to_openai(state), "transformers")
    rival = tiny.transformers_vision(projection=bool(num_classes)).to(dtype)
    # transformers 5 writes a tower that stands alone without the prefix that it has in a whole model
    own = converted if num_classes else {k.removeprefix("vision_model."): v for k, v in converted.items()}
    rival.load_state_dict(own, strict=True)
    tiny.assert_same_state(from_openai(to_openai(rival.state_dict()), "timm"), state)


def test_text_tower_to_transformers_and_back_is_bitwise(dtype: torch.dtype) -> None:
    state = tiny.cloned(tiny.open_clip_clip(custom_text=True).text.to(dtype).state_dict())
    rival = tiny.transformers_text(projection=True).to(dtype)
    rival.load_state_dict(from_openai(to_openai(state), "transformers"), strict=True)
    tiny.assert_same_state(to_openai(rival.state_dict()), state)


@pytest.mark.parametrize("resnet", [False, True])
def test_openai_is_clipfast_own_layout_in_order(dtype: torch.dtype, resnet: bool) -> None:
    state = openai_state(dtype, resnet=resnet)
    config = tiny.RESNET_CONFIG if resnet else tiny.CONFIG
    model = clipfast.create_model(config, dtype=dtype)
    model.load_state_dict(from_openai(to_openai(state), "openai"), strict=True)
    assert list(model.state_dict()) == list(state)
    rival = tiny.open_clip_clip(resnet=resnet).to(dtype)
    rival.load_state_dict(model.state_dict(), strict=True)
    tiny.assert_same_state(rival.state_dict(), state)


def test_timm_own_conversion_is_the_same() -> None:
    state = openai_state()
    rival = tiny.timm_vit()
    from timm.models.vision_transformer import checkpoint_filter_fn

    tiny.assert_same_state(from_openai(image_tower_of(state), "timm"), checkpoint_filter_fn(state, rival))


def test_what_came_is_left_as_it_was() -> None:
    for layout, state in (("timm", tiny.timm_vit().state_dict()), ("transformers", openai_state())):
        before = tiny.cloned(state)
        from_openai(image_tower_of(to_openai(state)), layout)
        tiny.assert_same_state(dict(state), before)


def test_timm_head_bias_with_values_is_refused() -> None:
    state = tiny.timm_vit().state_dict()
    state["head.bias"] = torch.full((32,), 1e-3)
    with pytest.raises(ValueError, match=r"head\.bias with values, expected none or zeros"):
        to_openai(state)


@pytest.mark.parametrize("layout", ["transformers", "timm", "openai"])
@pytest.mark.parametrize("key", ["ls1.gamma", "visual.transformer.resblocks.0.attn.q_norm.weight", "text.cls_emb"])
def test_keys_without_a_place_are_refused(layout: str, key: str) -> None:
    state = {k: v for k, v in openai_state().items() if k.startswith("visual.")} | {key: torch.ones(1)}
    with pytest.raises(ValueError, match=rf"{layout}.*no place for: {key}"):
        from_openai(state, layout)


def test_resnets_have_no_place_in_the_others() -> None:
    for layout in ("transformers", "timm"):
        with pytest.raises(ValueError, match=r"no place for: .*visual\.bn1\.weight.*, … and \d+ more$"):
            from_openai(image_tower_of(openai_state(resnet=True)), layout)


def test_unknown_layout() -> None:
    with pytest.raises(
        ValueError,
        match=r"layout: got 'keras', expected one of 'openai', 'open_clip', 'transformers', 'timm', 'big_vision'",
    ):
        from_openai(openai_state(), "keras")


@pytest.mark.parametrize("fault", ["missing", "shape", "dtype"])
def test_qkv_parts_must_be_there_and_alike(fault: str) -> None:
    state = tiny.transformers_clip().state_dict()
    key = "text_model.encoder.layers.1.self_attn.k_proj.weight"
    value = state.pop(key)
    if fault != "missing":
        state[key] = value[:-1] if fault == "shape" else value.half()
    with pytest.raises(ValueError, match=r"k_proj.*transformer\.resblocks\.1\.attn\.in_proj_weight.*one shape"):
        to_openai(state)


def test_packed_qkv_must_have_three_equal_parts() -> None:
    state = openai_state()
    state["transformer.resblocks.0.attn.in_proj_bias"] = torch.ones(145)
    with pytest.raises(ValueError, match=r"in_proj_bias: got shape \(145,\), expected 3 equal parts"):
        from_openai(state, "transformers")


def test_misshapen_tensors_of_other_layouts_keep_their_shape() -> None:
    state = tiny.timm_vit().state_dict() | {"pos_embed": torch.ones(2, 5, 64), "head.weight": torch.ones(32)}
    converted = to_openai(state)
    assert converted["visual.positional_embedding"].shape == (2, 5, 64)
    assert converted["visual.proj"].shape == (32,)


def test_towers_share_a_model_and_unknown_keys_belong_to_both() -> None:
    state = openai_state() | {"logit_bias": torch.ones(())}
    image, text = image_tower_of(state), text_tower_of(state)
    assert image.keys() | text.keys() | {"logit_scale", "logit_bias"} == state.keys()
    assert not image.keys() & text.keys()
    for tower_of in (image_tower_of, text_tower_of):
        assert "blocks.0.ls1.gamma" in tower_of({"blocks.0.ls1.gamma": torch.ones(1)})
