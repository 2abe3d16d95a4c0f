"""CLIP's own surface: what its methods return and in which form."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from rivals import captions

import clipfast

SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


def small_clip(**options: object) -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.CLIP(clipfast.CLIPConfig.from_dict(SMALL), **options).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64), captions(3, 12, 100)


def test_forward_gives_unit_features_and_the_scale() -> None:
    model, (images, tokens) = small_clip(), batch()
    image, text, scale = model(images, tokens)
    assert relative_error(image, torch.nn.functional.normalize(model.encode_image(images), dim=-1)) < 1e-14
    assert torch.equal(text, model.encode_text(tokens, normalize=True))
    assert relative_error(scale, torch.tensor(1 / 0.07)) < 1e-6
    assert model(images)[1] is None
    assert model(text=tokens)[0] is None


def test_output_dict_and_bias() -> None:
    model, (images, tokens) = small_clip(init_logit_bias=-10, output_dict=True), batch()
    outputs = model(image=images, text=tokens)
    assert list(outputs) == ["image_features", "text_features", "logit_scale", "logit_bias"]
    assert outputs["logit_bias"].item() == -10
    model.output_dict = False
    assert len(model(images, tokens)) == 4


def test_logits() -> None:
    model, (images, tokens) = small_clip(init_logit_bias=-2), batch()
    per_image, per_text = model.get_logits(images, tokens)
    image, text, scale, bias = model(images, tokens)
    assert relative_error(per_image, scale * image @ text.T + bias) < 1e-13
    assert torch.equal(per_text, per_image.T)


def test_gradient_checkpointing_reaches_both_towers() -> None:
    model, (images, tokens) = small_clip(), batch()
    model.set_grad_checkpointing()
    calls = []
    for transformer in (model.visual.transformer, model.transformer):
        transformer.resblocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    image, text, _ = model(images, tokens)
    (image * text).sum().backward()
    assert len(calls) == 4
    assert len(model.no_weight_decay() - set(dict(model.named_parameters()))) == 0


@pytest.mark.parametrize("swap", [False, True])
def test_images_and_tokens_in_the_wrong_places(swap: bool) -> None:
    model, (images, tokens) = small_clip(), batch()
    with pytest.raises((ValueError, TypeError), match="tokens: got|images: got"):
        model(*((tokens, images) if swap else (tokens, None)))
