"""Inference on the CPU of towers with other options than CLIP's: which the packed encoder serves, and their numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from oracle import assert_as_exact_as_reference
from tiny import drawn
from torch import Tensor

import clipfast
from clipfast.modules import transformer
from clipfast.ops import library

SIGLIP_VISION = {"pool_type": "map", "class_token": False, "no_ln_pre": True, "patch_bias": True, "norm_eps": 1e-6}
SIGLIP_TEXT = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_eps": 1e-6, "context_length": 16}
# so400m's heads of 72 and MLPs that are no multiple of 32, bigG's heads of 104
SIZES = {72: (288, 3.7362), 104: (416, 4.9231), 64: (128, 4.0)}


def model_of(head: int, vision: dict, text: dict, dtype: torch.dtype = torch.float32, **more: object) -> clipfast.CLIP:
    torch.manual_seed(0)
    width, ratio = SIZES[head]
    block = {"width": width, "layers": 2, "mlp_ratio": ratio}
    config = {
        "embed_dim": width,
        "vision_cfg": block | {"image_size": 32, "patch_size": 8, "head_width": head} | vision,
        "text_cfg": block | {"heads": width // head, "vocab_size": 100} | text,
    }
    return drawn(clipfast.create_model(config | more)).to(dtype).eval()


def siglip(head: int = 72, dtype: torch.dtype = torch.float32, **more: object) -> clipfast.CLIP:
    return model_of(head, SIGLIP_VISION, SIGLIP_TEXT, dtype, approximate="tanh", **more)


def clipa(head: int = 104, dtype: torch.dtype = torch.float32) -> clipfast.CLIP:
    pooled = {"pool_type": "avg", "no_ln_pre": True, "final_ln_after_pool": True}
    text = {"pool_type": "last", "no_causal_mask": True, "context_length": 16}
    return model_of(head, pooled, text, dtype)


def without_qkv_bias(head: int = 64, dtype: torch.dtype = torch.float32) -> clipfast.CLIP:
    return model_of(head, {"qkv_bias": False, "reg_tokens": 2}, {"qkv_bias": False, "context_length": 16}, dtype)


def images_of(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def tokens_of(batch: int = 5) -> Tensor:
    tokens = torch.randint(1, 98, (batch, 16), generator=torch.Generator().manual_seed(2))
    tokens[:, 9] = 99
    return tokens


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int | None]]:
    """Collect how many tokens the packed encoder is given, and which it reads."""
    calls: list[tuple[int, int | None]] = []
    original = transformer.encode

    def counting(x: Tensor, *args: object, **kwargs: object) -> Tensor:
        calls.append((x.shape[0], kwargs["read"]))
        return original(x, *args, **kwargs)

    monkeypatch.setattr(transformer, "encode", counting)
    return calls


def by_modules(function: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad(), clipfast.backend("reference"):
        return function()


KINDS = {
    "siglip": (siglip, [(48, None), (80, 15)]),
    "clipa": (clipa, [(51, None), (80, 15)]),
    "no qkv bias": (without_qkv_bias, [(57, 0), (50, -1)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_serve(kind: str, dtype: torch.dtype, encoded: list[tuple[int, int | None]]) -> None:
    build, expected = KINDS[kind]
    model = build(dtype=dtype)
    oracle = copy.deepcopy(model).double()
    with torch.no_grad():
        found = model.encode_image(images_of().to(dtype)), model.encode_text(tokens_of())
    assert encoded == expected
    for actual, encode, inputs in zip(found, ("encode_image", "encode_text"), (images_of(), tokens_of()), strict=True):
        given = inputs.to(dtype) if inputs.is_floating_point() else inputs
        exact = given.double() if inputs.is_floating_point() else inputs
        reference = by_modules(lambda encode=encode, given=given: getattr(model, encode)(given))
        truth = by_modules(lambda encode=encode, exact=exact: getattr(oracle, encode)(exact))
        assert_as_exact_as_reference(actual, reference, truth, encode)


def test_layer_scale_is_computed_by_the_modules(encoded: list[tuple[int, int | None]]) -> None:
    model = model_of(64, {"ls_init_value": 0.5}, {"context_length": 16})
    with torch.no_grad():
        actual = model.encode_image(images_of())
        assert encoded == []
        model.encode_text(tokens_of())
    assert len(encoded) == 1
    torch.testing.assert_close(actual, by_modules(lambda: model.encode_image(images_of())))


def test_a_projection_with_a_bias_follows_every_write() -> None:
    model, tokens = siglip(), tokens_of()
    with torch.no_grad():
        model.encode_text(tokens)
        model.text_projection.weight.mul_(2)
        model.text_projection.bias.add_(1)
        actual = model.encode_text(tokens)
        expected = by_modules(lambda: model.encode_text(tokens))
        torch.testing.assert_close(actual, expected)
        seen = []
        model.text_projection.register_forward_hook(lambda *args: seen.append(1))
        torch.testing.assert_close(model.encode_text(tokens), expected)
    assert seen == [1]


@pytest.mark.skipif(library.unavailable() is not None, reason="the op library is not built")
@pytest.mark.parametrize("build", [siglip, clipa])
def test_deterministic_features_do_not_depend_on_the_batch(build: Callable[[], clipfast.CLIP]) -> None:
    model = build()
    with torch.no_grad(), clipfast.deterministic():
        for encode, inputs in ((model.encode_image, images_of(7)), (model.encode_text, tokens_of(7))):
            together = encode(inputs)
            for rows in (slice(0, 1), slice(2, 5)):
                assert torch.equal(encode(inputs[rows]), together[rows])


def test_sizes_and_weights_of_ones_own() -> None:
    """``create_model`` with other images and captions than the weights are for."""
    config = siglip().config.to_dict() | {"init_logit_bias": -10}
    source = clipfast.create_model(config)
    model = clipfast.create_model(config, weights=source.state_dict(), image_size=(48, 32), context_length=24)
    assert model.visual.weights_grid == (4, 4)
    assert model.visual.positional_embedding.shape[0] == 6 * 4
    assert model.positional_embedding.shape[0] == 24
    assert torch.equal(model.logit_bias, source.logit_bias)
    assert model.encode_image(torch.randn(2, 3, 48, 32)).shape == (2, 288)
    half = clipfast.create_model(config, weights=source.state_dict(), dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.visual.attn_pool.probe, source.visual.attn_pool.probe.bfloat16())
