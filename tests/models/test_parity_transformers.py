"""clipfast computes what transformers computes from the same weights: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from oracle import relative_error
from rivals import captions
from torch import Tensor, nn

import clipfast
from clipfast.models.config import get_config
from clipfast.models.key_layouts import to_openai

# vision width, layers, patch; text width; E; heads are 64 wide
SIZES = {"ViT-B-32": (768, 12, 32, 512, 512), "ViT-L-14": (1024, 24, 14, 768, 768)}
# blocks are all alike: what a layout or a GELU gets wrong shows behind the first
FEW_LAYERS = 3
ATTENTION = {torch.float64: "sdpa", torch.float32: "eager"}  # eager takes its softmax in float32


def transformers_model(name: str, hidden_act: str, dtype: torch.dtype, few_layers: bool) -> nn.Module:
    width, layers, patch, text_width, embed = SIZES[name]
    layers, text_layers = (FEW_LAYERS, FEW_LAYERS) if few_layers else (layers, 12)
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "patch_size": patch}
    text = {"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_hidden_layers": text_layers}
    config = transformers.CLIPConfig(
        vision_config=vision | {"num_attention_heads": width // 64, "hidden_act": hidden_act},
        text_config=text | {"num_attention_heads": text_width // 64, "hidden_act": hidden_act},
        projection_dim=embed,
        attn_implementation=ATTENTION[dtype],
    )
    return tiny.drawn(transformers.CLIPModel(config).to(dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    # joined QKV biases: that of the keys alone has no gradient but rounding errors
    return to_openai({k: p.grad for k, p in model.named_parameters()})


def pair(
    name: str, hidden_act: str, dtype: torch.dtype, few_layers: bool = False
) -> tuple[nn.Module, Callable[[], clipfast.CLIP], Tensor, Tensor]:
    """Return transformers' model, a function that makes clipfast's of the same weights, images and captions."""
    torch.manual_seed(0)
    rival = transformers_model(name, hidden_act, dtype, few_layers)
    weights = rival.state_dict()
    ours = get_config({"quick_gelu": f"{name}-quickgelu", "gelu": name}[hidden_act])
    if few_layers:
        vision, text = (replace(part, layers=FEW_LAYERS) for part in (ours.vision_cfg, ours.text_cfg))
        ours = replace(ours, vision_cfg=vision, text_cfg=text)
    make = partial(clipfast.create_model, ours, weights=weights, dtype=dtype)
    return rival, make, torch.randn(2, 3, 224, 224, dtype=dtype), captions(2)


def compare_fp64(name: str, hidden_act: str, folder: Path, few_layers: bool = False) -> None:
    rival, make, images, tokens = pair(name, hidden_act, torch.float64, few_layers)
    output = rival(input_ids=tokens, pixel_values=images, return_loss=True)
    output.loss.backward()
    expected = {"image": output.image_embeds, "text": output.text_embeds, "loss": output.loss}
    # L/14 is 3.4 GB a copy: the rival's gradients wait on disk
    torch.save({k: v.detach() for k, v in expected.items()} | gradients(rival), folder / "expected.pt")
    rival.zero_grad()
    del output, expected
    model = make()
    del rival, make
    image_features, text_features, scale = model(images, tokens)
    loss = clipfast.ContrastiveLoss()(image_features, text_features, scale)
    loss.backward()
    actual = {"image": image_features, "text": text_features, "loss": loss}
    actual |= {k: p.grad for k, p in model.named_parameters()}
    expected = torch.load(folder / "expected.pt", mmap=True, weights_only=True)
    (folder / "expected.pt").unlink()
    assert actual.keys() == expected.keys()
    errors = {k: relative_error(actual[k], v) for k, v in expected.items()}
    worst = max(errors, key=errors.get)
    print(f"{name} {hidden_act} float64: {errors[worst]:.1e} ({worst})")
    assert all(error <= 1e-10 for error in errors.values()), errors


@pytest.mark.parametrize(
    ("hidden_act", "few_layers"),
    [("quick_gelu", False), ("gelu", True), pytest.param("gelu", False, marks=pytest.mark.exhaustive)],
)
def test_b32_fp64_outputs_and_gradients(hidden_act: str, few_layers: bool, tmp_path: Path) -> None:
    compare_fp64("ViT-B-32", hidden_act, tmp_path, few_layers)


@pytest.mark.exhaustive
@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
def test_l14_fp64_outputs_and_gradients(hidden_act: str, tmp_path: Path) -> None:
    compare_fp64("ViT-L-14", hidden_act, tmp_path)


@pytest.mark.parametrize("hidden_act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize(
    ("name", "few_layers"),
    [("ViT-B-32", False), ("ViT-L-14", True), pytest.param("ViT-L-14", False, marks=pytest.mark.exhaustive)],
)
@torch.no_grad()
def test_fp32_outputs(name: str, few_layers: bool, hidden_act: str) -> None:
    rival, make, images, tokens = pair(name, hidden_act, torch.float32, few_layers)
    output = rival(input_ids=tokens, pixel_values=images)
    image_features, text_features, _ = make()(images, tokens)
    errors = relative_error(image_features, output.image_embeds), relative_error(text_features, output.text_embeds)
    print(f"{name} {hidden_act} float32: image {errors[0]:.1e}, text {errors[1]:.1e}")
    assert errors[0] <= 2e-6
    assert errors[1] <= 2e-6


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("hidden_act", "approximate"), [("gelu", "none"), ("quick_gelu", "quick")])
def test_vision_models_alone(projection: bool, hidden_act: str, approximate: str) -> None:
    rival = tiny.transformers_vision(projection, hidden_act).double()
    vit = clipfast.ViT(32, 16, 64, 2, 2, output_dim=32 if projection else None, approximate=approximate).double()
    clipfast.load_weights(vit, rival.state_dict())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    output = rival(pixel_values=images)
    pooled = output.image_embeds if projection else output.pooler_output
    assert relative_error(vit(images), pooled) <= 1e-10
    # transformers leaves the last LayerNorm out of the tokens
    last = vit.forward_intermediates(images, 1, output_fmt="NLC", output_extra_tokens=True)
    tokens = torch.cat([last["image_intermediates_prefix"][0], last["image_intermediates"][0]], dim=1)
    assert relative_error(tokens, output.last_hidden_state) <= 1e-10
    weights = torch.randn_like(pooled)
    (weights * pooled).sum().backward()
    (weights * vit(images)).sum().backward()
    own = dict(vit.named_parameters())
    for key, value in gradients(rival).items():
        assert relative_error(own.pop(key.removeprefix("visual.")).grad, value) <= 1e-10, key
    assert not own


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize(("hidden_act", "approximate"), [("gelu", "none"), ("quick_gelu", "quick")])
def test_text_models_alone(projection: bool, hidden_act: str, approximate: str) -> None:
    rival = tiny.transformers_text(projection, hidden_act).double()
    text = clipfast.TextTransformer(
        16, 100, 48, 3, 2, output_dim=32 if projection else None, approximate=approximate
    ).double()
    clipfast.load_weights(text, rival.state_dict())
    tokens = captions(5, 16, 100)
    output = rival(input_ids=tokens)
    pooled = output.text_embeds if projection else output.pooler_output
    assert relative_error(text(tokens), pooled) <= 1e-10
    assert relative_error(text.forward_features(tokens), output.last_hidden_state) <= 1e-10
    weights = torch.randn_like(pooled)
    (weights * pooled).sum().backward()
    (weights * text(tokens)).sum().backward()
    own = dict(text.named_parameters())
    for key, value in gradients(rival).items():
        assert relative_error(own.pop(key).grad, value) <= 1e-10, key
    assert not own


def test_the_wrong_gelu_is_seen() -> None:
    rival = tiny.transformers_clip("quick_gelu")
    model = clipfast.load_weights(clipfast.create_model(tiny.CONFIG), rival.state_dict())
    images = torch.randn(3, 3, 32, 32)
    expected = rival.get_image_features(pixel_values=images).pooler_output
    assert relative_error(model.encode_image(images), expected) > 1e-4
