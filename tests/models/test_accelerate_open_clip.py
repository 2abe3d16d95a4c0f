"""clipfast.accelerate on open_clip's models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import pytest
import tiny
import torch
from acceleration import Case, assert_close, counted
from acceleration_checks import (
    COMMON,
    RARE,
    check_changed,
    check_checkpointed_gradients,
    check_hooked,
    check_packed_inference,
    parametrize,
)
from oracle import relative_error
from rivals import captions
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast.models.accelerate import AccelerateWarning


def both(dtype: torch.dtype) -> dict[str, Any]:
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)
    return {"image": images, "text": captions(3, 16, 100)}


def clip(custom: bool = False, vision: dict | None = None, text: dict | None = None, **changes: Any) -> nn.Module:
    config = copy.deepcopy(tiny.CONFIG)
    config["vision_cfg"] |= vision or {}
    config["text_cfg"] |= text or {}
    return tiny.drawn((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config, **changes))


def visual(dtype: torch.dtype) -> dict[str, Any]:
    return {"x": both(dtype)["image"]}


def text(dtype: torch.dtype) -> dict[str, Any]:
    return {"text": both(dtype)["text"]}


SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}
CLIP = Case("CLIP", clip, both, towers=2)
CASES = [
    CLIP,
    Case("quickgelu", partial(clip, quick_gelu=True), both, towers=2),
    Case("dict and bias", partial(clip, output_dict=True, init_logit_bias=-10.0), both, towers=2),
    Case("CustomTextCLIP", partial(clip, custom=True), both, towers=2),
    Case("EOS", partial(clip, text={"pool_type": "eos", "eos_id": 99}), both, towers=2),
    Case("missing EOS", partial(clip, custom=True, text={"pool_type": "eos", "eos_id": 7}), both, towers=2),
    Case("SigLIP's text", partial(clip, custom=True, text=SIGLIP), both, towers=2),
    Case("mean of tokens", partial(clip, vision={"pool_type": "avg", "final_ln_after_pool": True}), both, towers=2),
    Case("patch dropout", partial(clip, vision={"patch_dropout": 0.5}), both, towers=2),
    Case("no norm before", partial(clip, vision={"no_ln_pre": True}, text={"proj_type": "none"}), both, towers=2),
    Case("SigLIP", tiny.open_clip_siglip, both, towers=2),
    Case("layer scale", partial(clip, vision={"ls_init_value": 0.1}, text={"ls_init_value": 0.2}), both, towers=2),
    Case("CLIPA", partial(clip, vision=CLIPA, text={"no_causal_mask": True, "pool_type": "last"}), both, towers=2),
    Case("first token", partial(clip, custom=True, text={"pool_type": "first"}), both, towers=2),
    Case("image tower", lambda: clip().visual, visual),
    Case("image tokens", lambda: clip(vision={"output_tokens": True}).visual, visual),
    Case("pooled by attention", lambda: clip(vision={"attentional_pool": True, "attn_pooler_heads": 2}).visual, visual),
    Case("text tower", lambda: clip(custom=True).text, text),
    Case("text tokens", lambda: clip(custom=True, text={"output_tokens": True}).text, text),
]


@parametrize(CASES, COMMON)
def test_accelerated(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([CLIP, next(c for c in CASES if c.name == "SigLIP")], (*RARE, check_checkpointed_gradients))
def test_accelerated_clip(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize(
    [next(c for c in CASES if c.name == "CustomTextCLIP")], (check_hooked, check_changed, check_packed_inference)
)
def test_accelerated_custom_text(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_encoding_and_logits() -> None:
    model, original = CLIP.pair()
    x = both(torch.float64)
    with counted() as calls:
        for normalize in (False, True):
            assert_close([model.encode_text(x["text"], normalize)], [original.encode_text(x["text"], normalize)], 1e-12)
        image, expected = (m.encode_image(x["image"], normalize=True) for m in (model, original))
        assert_close([image], [expected], 1e-12)
        assert_close(list(model.get_logits(**x)), list(original.get_logits(**x)), 1e-12)
    assert len(calls) == 5


def test_intermediates_are_the_originals() -> None:
    model, original = CLIP.pair()
    x = both(torch.float64)
    with counted() as calls:
        actual, expected = (m.forward_intermediates(**x) for m in (model, original))
    assert not calls
    assert actual.keys() == expected.keys()
    assert_close([actual["image_features"]], [expected["image_features"]], 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_two_dtypes(dtype: torch.dtype) -> None:
    """open_clip's precision "bf16" and "fp16" leave embeddings and norms in float32."""
    config = copy.deepcopy(tiny.CONFIG)
    original = tiny.drawn(open_clip.CLIP(**config, cast_dtype=dtype))
    exact = open_clip.CLIP(**config).double()  # whose norms do not go to float32
    exact.load_state_dict(original.state_dict())
    open_clip.model.convert_weights_to_lp(original, dtype)
    model = clipfast.accelerate(copy.deepcopy(original))
    x = both(dtype)
    with torch.no_grad(), counted() as calls:
        actual, expected, oracle = model(**x), original(**x), exact(**both(torch.float64))
    assert len(calls) == 2
    for a, e, o in zip(actual[:2], expected[:2], oracle[:2], strict=True):
        assert a.dtype == e.dtype == dtype
        assert relative_error(a, o) <= 2 * relative_error(e, o) + 2 * torch.finfo(dtype).eps


def test_autocast() -> None:
    model, original = CLIP.pair(torch.float32)
    x = both(torch.float32)
    oracle = copy.deepcopy(original).double()(**both(torch.float64))
    with torch.autocast("cpu", torch.bfloat16), counted() as calls:
        actual, expected = model(**x), original(**x)
    assert len(calls) == 2
    for a, e, o in zip(actual[:2], expected[:2], oracle[:2], strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, o) <= 2 * relative_error(e, o) + 2 * torch.finfo(torch.bfloat16).eps


def test_parts_outside_the_towers_may_be_changed() -> None:
    """Freezing, new projections and pruned blocks reach the accelerated model."""
    model, original = CLIP.pair()
    for m in (model, original):
        m.lock_image_tower(unlocked_groups=1)
        m.lock_text_tower(unlocked_layers=1)
        m.text_projection = nn.Parameter(torch.ones(48, 32, dtype=torch.float64))
        m.visual.prune_intermediate_layers(1, prune_head=False)
        m.transformer.prune_intermediate_layers([0])
    with counted() as calls:
        assert_close(CLIP.call(model), CLIP.call(original), 1e-12)
    assert len(calls) == 2
    assert len(model.visual.transformer.resblocks) == len(original.visual.transformer.resblocks)


def test_shorter_captions() -> None:
    model, original = CLIP.pair()
    tokens = both(torch.float64)["text"]
    tokens[:, 5:] = 0
    tokens[:, 4] = 99
    assert_close([model.encode_text(tokens[:, :5])], [original.encode_text(tokens)], 1e-12)


@pytest.mark.parametrize(
    "tokens", [torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 16), torch.full((2, 16), 100), "a cat"]
)
def test_wrong_captions_raise_as_in_the_original(tokens: Tensor | str) -> None:
    model, original = CLIP.pair()
    with pytest.raises(Exception) as expected:  # noqa: PT011
        original.encode_text(tokens)
    with pytest.raises(type(expected.value)) as actual:
        model.encode_text(tokens)
    assert str(actual.value) == str(expected.value)


def test_wrong_images_raise_as_in_the_original() -> None:
    model, original = CLIP.pair()
    for m in (model, original):
        with pytest.raises(RuntimeError, match="size of tensor a"):
            m.encode_image(torch.randn(2, 3, 48, 32, dtype=torch.float64))


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({"custom": True, "text": {"embed_cls": True}}, "text", "appends a class token"),
        ({"text": {"qk_norm": True}}, "the model", "block 0 is a .*CustomResidualAttentionBlock"),
        ({"text": {"act_kwargs": {"approximate": "tanh"}}}, None, ""),
        ({"vision": {"layers": [1, 1, 1, 1], "width": 8}}, "visual", "ModifiedResNet: "),
    ],
)
def test_what_is_left_alone_is_named(changes: dict[str, Any], path: str | None, reason: str) -> None:
    case = Case("", partial(clip, **changes), both)
    if path is None:
        model, original = case.pair()
    else:
        with pytest.warns(AccelerateWarning, match=f"{path}: .*{reason}"):
            model, original = case.pair()
        assert "left alone" in str(clipfast.acceleration(model))
    with counted() as calls:
        assert_close(case.call(model), case.call(original), 1e-12)
    assert len(calls) == (1 if path else 2)


def test_a_text_model_without_a_causal_mask_stays_dense() -> None:
    """Only a causal text read at its EOS may leave tokens out: here the last tokens change the result."""
    for changes in ({"no_causal_mask": True}, {"pool_type": "last"}):
        case = Case("", partial(clip, custom=True, text=changes), both, towers=2)
        model, original = case.pair()
        tokens = both(torch.float64)["text"]
        changed = tokens.clone()
        changed[:, -1] = 5
        expected = original.encode_text(tokens), original.encode_text(changed)
        assert relative_error(*expected) > 1e-3
        assert_close([model.encode_text(tokens), model.encode_text(changed)], list(expected), 1e-12)


def test_another_mask_is_refused() -> None:
    model = clip()
    model.attn_mask[3, 1] = -torch.inf
    with pytest.warns(AccelerateWarning, match="the model: its attn_mask is not the causal one"):
        clipfast.accelerate(model)


def test_changed_methods_are_refused() -> None:
    class Other(open_clip.CLIP):
        def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
            return super().encode_text(text) + 1

    with pytest.warns(AccelerateWarning, match="its encode_text is not that of open_clip's CLIP"):
        clipfast.accelerate(Other(**tiny.CONFIG))
    model = clip()
    model.visual.forward = lambda x: x
    with pytest.warns(AccelerateWarning, match="visual: its forward is not that of open_clip's VisionTransformer"):
        clipfast.accelerate(model)


def test_subclasses_are_accelerated() -> None:
    class Named(open_clip.CLIP):
        pass

    model = clipfast.accelerate(Named(**tiny.CONFIG))
    assert isinstance(model, Named)
    assert clipfast.acceleration(model).accelerated == ("", "visual")
    assert type(clipfast.restore(model)) is Named


def test_models_that_hold_a_clip() -> None:
    model = nn.ModuleDict({"teacher": clip(), "head": nn.Linear(32, 2)})
    clipfast.accelerate(model)
    assert clipfast.acceleration(model).accelerated == ("teacher", "teacher.visual")


def test_timm_trunks() -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear"}
    config = copy.deepcopy(tiny.CONFIG) | {"vision_cfg": vision}
    original = tiny.drawn(open_clip.CLIP(**config)).double()
    model = clipfast.accelerate(copy.deepcopy(original))
    assert clipfast.acceleration(model).accelerated == ("", "visual.trunk")
    x = {"image": torch.randn(1, 3, 224, 224, dtype=torch.float64), "text": captions(3, 16, 100)}
    with counted() as calls, torch.no_grad():
        assert_close(list(model(**x)), list(original(**x)), 1e-12)
    assert len(calls) == 2
    config["vision_cfg"] = vision | {"timm_model_name": "resnet18", "timm_pool": "avg"}
    with pytest.warns(AccelerateWarning, match="visual: its trunk is timm's ResNet"):
        clipfast.accelerate(open_clip.CLIP(**config))


def test_quantised_and_scripted_modules_are_left_alone() -> None:
    model = clip()
    model.visual = torch.ao.quantization.quantize_dynamic(model.visual, {nn.Linear})
    with pytest.warns(AccelerateWarning, match="visual: block 0's first linear layer is a torch.ao.*quantized"):
        clipfast.accelerate(model)
    assert clipfast.acceleration(model).accelerated == ("",)
    model = clip()
    model.visual = torch.jit.trace(model.visual, (both(torch.float32)["image"],))
    with pytest.warns(AccelerateWarning, match="visual: it is TorchScript"):
        clipfast.accelerate(model)
    with pytest.raises(ValueError, match="the model: it is TorchScript"):
        clipfast.accelerate(torch.jit.trace(clip().visual, (both(torch.float32)["image"],)))


def test_global_hooks() -> None:
    model, original = CLIP.pair()
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    with counted() as calls:
        CLIP.call(model)
    handle.remove()
    assert not calls
    assert model.visual.transformer.resblocks[0].ln_1 in seen
    with counted() as calls, FlopCounterMode(display=False) as fast:
        CLIP.call(model)
    assert len(calls) == 2
    with FlopCounterMode(display=False) as slow:
        CLIP.call(original)
    assert 0 < fast.get_total_flops() < slow.get_total_flops()


def test_own_models_are_fast_already() -> None:
    model = clipfast.create_model(tiny.CONFIG)
    kind = type(model)
    assert clipfast.restore(clipfast.accelerate(model)) is model
    assert type(model) is kind


def test_what_is_no_model_is_refused() -> None:
    for function in (clipfast.accelerate, clipfast.restore):
        with pytest.raises(TypeError, match="got dict, expected a torch.nn.Module"):
            function({})
    with pytest.raises(ValueError, match=r"got a torch.nn.modules.linear.Linear with nothing in it"):
        clipfast.accelerate(nn.Linear(2, 2))
    assert clipfast.restore(nn.Linear(2, 2)) is not None


def test_a_model_wrapped_since_is_not_restored() -> None:
    model = clipfast.accelerate(clip())
    accelerated = type(model.visual)
    model.visual.__class__ = type("Wrapped", (accelerated,), {})
    with pytest.raises(ValueError, match="got a Wrapped that was wrapped after clipfast.accelerate"):
        clipfast.restore(model)
    assert type(model) is not open_clip.CLIP  # all or nothing
    with counted() as calls:
        CLIP.call(model, torch.float32)
    assert len(calls) == 2


def test_replicas_of_data_parallel_run_the_original() -> None:
    model, original = CLIP.pair()
    replica = model.visual._replicate_for_data_parallel()
    replica._modules.update(model.visual._modules)
    for name, parameter in model.visual._parameters.items():
        replica.__dict__[name] = parameter
    x = both(torch.float64)["image"]
    with counted() as calls:
        assert_close([replica(x)], [original.visual(x)], 0)
    assert not calls
    with counted() as calls:
        model.visual(x)
    assert len(calls) == 1
