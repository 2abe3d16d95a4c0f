"""What code for open_clip's model reads, calls and locks is there, and is the same."""

from __future__ import annotations

import open_clip
import pytest
import tiny
import torch
from oracle import relative_error
from rivals import captions
from torch import Tensor, nn

import clipfast
from clipfast.modules.resnet import FrozenBatchNorm2d


def pair(*, resnet: bool = False, **changes: object) -> tuple[clipfast.CLIP, nn.Module]:
    """Return clipfast's model and open_clip's with the same weights, in float64."""
    theirs = tiny.open_clip_clip(resnet=resnet, **changes).double().eval()
    mine = tiny.clip(tiny.RESNET_CONFIG if resnet else tiny.CONFIG, dtype=torch.float64).eval()
    if theirs.logit_bias is not None:
        mine.logit_bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


def inputs() -> dict[str, Tensor]:
    return {"image": torch.randn(3, 3, 32, 32, dtype=torch.float64), "text": captions(3, 16, 100)}


def assert_same_outputs(actual: object, expected: object) -> None:
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for key in expected:
            assert_same_outputs(actual[key], expected[key])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_outputs(a, e)
    else:
        assert actual.shape == expected.shape
        assert relative_error(actual, expected) <= 1e-12


OPTIONS = [
    {},
    {"normalize": False, "normalize_intermediates": True},
    {"intermediates_only": True, "output_logits": True, "output_logit_scale_bias": True},
    {"image_output_fmt": "NLC", "image_output_extra_tokens": True, "text_output_extra_tokens": True},
    {"output_logits": True, "output_logit_scale_bias": True, "normalize_intermediates": True},
    {"image_indices": 1, "text_indices": 2},
    {"image_indices": [0], "text_indices": [-1, 0], "stop_early": True},
    {"image_indices": [1, 0], "text_indices": [0], "stop_early": True, "intermediates_only": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("given", [("image", "text"), ("image",), ("text",)], ids="+".join)
def test_intermediates_of_the_whole_model(given: tuple[str, ...], options: dict, shared: tuple) -> None:
    mine, theirs = shared
    given = {name: value for name, value in inputs().items() if name in given}
    if len(given) == 1:
        options = options | {"output_logits": False}
    assert_same_outputs(
        mine.forward_intermediates(**given, **options), theirs.forward_intermediates(**given, **options)
    )


@pytest.fixture(scope="module")
def shared() -> tuple[clipfast.CLIP, nn.Module]:
    """Models that are only read."""
    return pair(init_logit_bias=-3.0)


@pytest.mark.parametrize("indices", [None, 2, [0], [1, -1]], ids=str)
@pytest.mark.parametrize("stop_early", [False, True])
@pytest.mark.parametrize("only", [False, True])
def test_intermediates_of_towers(indices: object, stop_early: bool, only: bool, shared: tuple) -> None:
    options = {"indices": indices, "stop_early": stop_early, "intermediates_only": only}
    mine, theirs = shared
    images, tokens = inputs().values()
    for form in ({}, {"output_fmt": "NLC", "output_extra_tokens": True, "normalize_intermediates": True}):
        assert_same_outputs(
            mine.visual.forward_intermediates(images, **options, **form),
            theirs.visual.forward_intermediates(images, **options, **form),
        )
    custom = tiny.open_clip_clip(custom_text=True).double().eval().text
    text = tiny.text_transformer().double()
    text.load_state_dict(custom.state_dict())
    for form in ({"output_fmt": "NLC"}, {"output_fmt": "NLC", "normalize_intermediates": True}):
        assert_same_outputs(
            text.forward_intermediates(tokens, **options, **form),
            custom.forward_intermediates(tokens, **options, **form),
        )


@pytest.mark.parametrize("options", [{}, {"indices": [0, -1]}, {"indices": 2, "intermediates_only": True}], ids=str)
def test_intermediates_of_resnets(options: dict) -> None:
    mine, theirs = pair(resnet=True)
    images = inputs()["image"]
    assert_same_outputs(
        mine.visual.forward_intermediates(images, **options), theirs.visual.forward_intermediates(images, **options)
    )
    # features are those of all stages, wherever the last map was taken
    output = mine.visual.forward_intermediates(images, indices=[1], stop_early=True)
    assert torch.equal(output["image_features"], mine.visual(images))


def test_wrong_formats_and_indices() -> None:
    model, given = tiny.clip(dtype=torch.float64), inputs()
    for call in (
        lambda: model.visual.forward_intermediates(given["image"], output_fmt="NHWC"),
        lambda: model.forward_intermediates(given["image"], image_output_fmt="NHWC"),
        lambda: tiny.text_transformer().forward_intermediates(given["text"], output_fmt="NCHW"),
        lambda: tiny.clip(tiny.RESNET_CONFIG).visual.forward_intermediates(given["image"].float(), output_fmt="NLC"),
    ):
        with pytest.raises(ValueError, match="output_fmt: got 'N"):
            call()
    for options in ({"image_indices": 0}, {"image_indices": [2]}, {"text_indices": [-4]}):
        with pytest.raises(ValueError, match="indices: got"):
            model.forward_intermediates(**given, **options)
    with pytest.raises(ValueError, match="output_logits: got an image or a text alone"):
        model.forward_intermediates(given["image"], output_logits=True)


def frozen(model: nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("groups", [-2, 0, 1, 2, 3, 4, 9])
def test_locks_freeze_what_open_clips_freeze(groups: int) -> None:
    mine, theirs = pair()
    for model in (mine, theirs):
        model.logit_scale.requires_grad_(False)  # neither tower's, and left as it is
        model.lock_image_tower(groups)
    assert frozen(mine) == frozen(theirs)
    for model in (mine, theirs):
        model.lock_text_tower(groups)
    assert frozen(mine) == frozen(theirs)
    # a second lock overrides the first
    for model in (mine, theirs):
        model.lock_image_tower(unlocked_groups=2, freeze_bn_stats=True)
        model.lock_text_tower(unlocked_layers=1, freeze_layer_norm=True)
    assert frozen(mine) == frozen(theirs)
    assert sum(frozen(mine).values()) > 0


def test_a_locked_tower_learns_where_it_may() -> None:
    mine, theirs = pair()
    for model in (mine, theirs):
        model.lock_image_tower(2)
        model.lock_text_tower(2)
        image, text, scale = model(**inputs_once())
        (scale * (image * text).sum()).backward()
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    for key, parameter in mine.named_parameters():
        assert (parameter.grad is None) == (expected[key] is None), key
        if parameter.grad is not None:
            assert relative_error(parameter.grad, expected[key]) <= 1e-10 or expected[key].abs().max() < 1e-12, key


def inputs_once() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return inputs()


@pytest.mark.parametrize("bn", [False, True])
def test_locks_of_resnets(bn: bool) -> None:
    mine, theirs = pair(resnet=True)
    for model in (mine, theirs):
        model.lock_image_tower(freeze_bn_stats=bn)
        model.train()
    # open_clip's frozen norms hold buffers in the place of parameters, and so do these
    assert frozen(mine) == frozen(theirs)
    assert any(isinstance(m, FrozenBatchNorm2d) for m in mine.modules()) == bn
    images = inputs()["image"]
    assert relative_error(mine.encode_image(images), theirs.encode_image(images)) <= 1e-12
    if bn:
        statistics = mine.visual.bn1.running_mean.clone()
        mine.encode_image(images)
        assert torch.equal(mine.visual.bn1.running_mean, statistics)
        assert list(mine.state_dict()) == list(theirs.state_dict())
        whole = tiny.open_clip_clip(resnet=True).double().state_dict()
        clipfast.load_weights(mine, whole)
        mine.load_state_dict(whole, strict=True)
        assert torch.equal(mine.visual.bn1.running_var, whole["visual.bn1.running_var"])
    with pytest.raises(ValueError, match="unlocked_groups: got 1, expected 0"):
        mine.lock_image_tower(1)


def test_layer_norms_are_frozen_with_their_layers() -> None:
    for lock in (tiny.clip().lock_text_tower, tiny.text_transformer().lock):
        with pytest.raises(ValueError, match="freeze_layer_norm: got False, expected True"):
            lock(0, freeze_layer_norm=False)


def last_block(tower: torch.nn.Module) -> str:
    return f"transformer.resblocks.{tower.transformer.layers - 1}."


def test_towers_alone_lock_themselves() -> None:
    for groups in (0, 1, 3):
        mine, theirs = pair()
        mine.visual.lock(groups)
        theirs.visual.lock(groups)
        assert frozen(mine.visual) == frozen(theirs.visual)
        text, custom = tiny.text_transformer(), tiny.open_clip_clip(custom_text=True).text
        text.lock(groups)
        custom.lock(groups)
        assert frozen(text) == frozen(custom)
    # without a projection there is one group fewer
    vit, text = tiny.vit(output_dim=None), tiny.text_transformer(output_dim=None)
    vit.lock(1)
    assert all(on == k.startswith((last_block(vit), "ln_post")) for k, on in frozen(vit).items())
    text.lock(1)
    assert all(on == (k.startswith(("transformer.resblocks.2", "ln_final"))) for k, on in frozen(text).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_causal_mask(dtype: torch.dtype) -> None:
    mine, theirs = tiny.clip(dtype=dtype), tiny.open_clip_clip().to(dtype)
    assert torch.equal(mine.attn_mask, theirs.attn_mask)
    assert mine.attn_mask.dtype == dtype
    assert torch.equal(tiny.text_transformer().attn_mask, tiny.open_clip_clip(custom_text=True).text.attn_mask)
    assert "attn_mask" not in mine.state_dict()
    assert list(mine.state_dict()) == list(theirs.state_dict())
    mine.attn_mask = theirs.attn_mask
    for mask in (None, torch.zeros(16, 16), theirs.attn_mask[:8, :8]):
        with pytest.raises(ValueError, match="attn_mask: got .*, expected the causal one of 16 tokens"):
            mine.attn_mask = mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cast_dtype(dtype: torch.dtype) -> None:
    mine, theirs = tiny.clip(dtype=dtype), tiny.open_clip_clip().to(dtype)
    assert mine.transformer.get_cast_dtype() == theirs.transformer.get_cast_dtype() == dtype
    assert mine.visual.transformer.get_cast_dtype() == dtype
    # a model in mixed precision, as open_clip converts it
    open_clip.model.convert_weights_to_lp(theirs, torch.float16)
    assert theirs.transformer.get_cast_dtype() == torch.float16
