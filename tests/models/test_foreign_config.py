"""The configuration of a model's folder is transformers' or open_clip's, or an error names what is not computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import tiny_siglip
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import clipfast
from clipfast.models.clip import CLIP
from clipfast.models.config import get_config
from clipfast.models.foreign_config import folder_config, transformers_config
from clipfast.models.open_model import open_model

KINDS = {
    "clip": (transformers.CLIPConfig, transformers.CLIPVisionConfig, transformers.CLIPTextConfig),
    "metaclip_2": (transformers.MetaClip2Config, transformers.MetaClip2VisionConfig, transformers.MetaClip2TextConfig),
    "siglip": (transformers.SiglipConfig, transformers.SiglipVisionConfig, transformers.SiglipTextConfig),
    "siglip2": (transformers.Siglip2Config, transformers.Siglip2VisionConfig, transformers.Siglip2TextConfig),
}
GELU = {"quick_gelu": "quick", "gelu": "none", "gelu_pytorch_tanh": "tanh"}


def assert_equal(ours: clipfast.CLIPConfig, theirs: transformers.PreTrainedConfig) -> None:
    """Compare every size with what transformers' own classes make of the same values."""
    vision, text = theirs.vision_config, theirs.text_config
    siglip = theirs.model_type.startswith("siglip")
    patch = vision.patch_size
    pixels = round(vision.num_patches**0.5) * patch if theirs.model_type == "siglip2" else vision.image_size
    image, captions = ours.vision_cfg, ours.text_cfg
    assert ours.embed_dim == (vision.hidden_size if siglip else theirs.projection_dim)
    assert (image.image_size, image.patch_size, image.width) == (pixels, patch, vision.hidden_size)
    assert (image.layers, image.heads) == (vision.num_hidden_layers, vision.num_attention_heads)
    assert int(image.width * image.mlp_ratio) == vision.intermediate_size
    assert (captions.width, captions.layers, captions.heads) == (
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
    )
    assert int(captions.width * captions.mlp_ratio) == text.intermediate_size
    assert (captions.vocab_size, captions.context_length) == (text.vocab_size, text.max_position_embeddings)
    assert (image.norm_eps, captions.norm_eps) == (vision.layer_norm_eps, text.layer_norm_eps)
    assert ours.vision_approximate == GELU[vision.hidden_act]
    assert ours.text_approximate == GELU[text.hidden_act]
    assert image.naflex is (theirs.model_type == "siglip2")
    assert (image.pool_type, image.class_token) == (("map", False) if siglip else ("tok", True))
    assert (ours.init_logit_bias is not None) is siglip
    if siglip:
        assert (captions.pool_type, captions.no_causal_mask, captions.proj_bias) == ("last", True, True)
    elif theirs.model_type == "clip" and text.eos_token_id == 2:
        assert captions.pool_type == "argmax"
    else:
        assert (captions.pool_type, captions.eos_id) == ("eos", text.eos_token_id)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["all left out", "only what differs", "all written"])
def test_sizes_and_defaults_are_transformers_own(kind: str, form: str, tmp_path: Path) -> None:
    whole, *_ = KINDS[kind]
    vision: dict[str, Any] = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    text: dict[str, Any] = {"vocab_size": 50_000, "hidden_size": 1152, "intermediate_size": 4304}
    text |= {"num_attention_heads": 16, "eos_token_id": 49_999}
    if form == "all left out":
        values = {"model_type": kind}
        theirs = whole()
    else:
        theirs = whole(vision_config=vision, text_config=text)
        values = {"model_type": kind, "vision_config": vision, "text_config": text}
    if form == "all written":
        values = theirs.to_dict()  # the file holds what differs from the defaults
        theirs.save_pretrained(tmp_path)
        assert folder_config(tmp_path) == transformers_config(values)
    assert_equal(transformers_config(values), theirs)


@pytest.mark.parametrize(
    "ratio", [(1152, 4304), (768, 3072), (1664, 8192), (640, 1707), (1408, 6144), (49, 48), (176, 240), (1664, 3840)]
)
def test_an_mlp_ratio_gives_the_hidden_width_back(ratio: tuple[int, int]) -> None:
    width, hidden = ratio
    part = {"hidden_size": width, "intermediate_size": hidden, "num_attention_heads": 1}
    config = transformers_config({"model_type": "siglip", "vision_config": part, "text_config": part})
    assert int(width * config.vision_cfg.mlp_ratio) == int(width * config.text_cfg.mlp_ratio) == hidden


def test_parts_of_an_old_name_and_an_old_eos() -> None:
    values = {"model_type": "clip", "text_config": {"hidden_size": 64}, "text_config_dict": {"eos_token_id": 2}}
    ours = transformers_config(values)
    assert_equal(ours, transformers.CLIPConfig(**{k: v for k, v in values.items() if k != "model_type"}))
    assert ours.text_cfg.pool_type == "argmax"
    assert ours.text_cfg.width == 512


def test_towers_may_have_a_gelu_each() -> None:
    values = {"model_type": "siglip", "vision_config": {"hidden_act": "gelu"}}
    ours = transformers_config(values)
    assert (ours.vision_approximate, ours.text_approximate) == ("none", "tanh")


SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
GIANT = {"hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40, "num_attention_heads": 16}
HUGE = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
VISION, TEXT = "vision_config", "text_config"
PUBLISHED = {
    "ViT-B-32-quickgelu": {"model_type": "clip"},
    "ViT-H-14-worldwide": {
        "model_type": "metaclip_2",
        "projection_dim": 1024,
        VISION: HUGE | {"patch_size": 14, "hidden_act": "gelu"},
        TEXT: {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "vocab_size": 901_629,
            "eos_token_id": 2,
            "hidden_act": "gelu",
        },
    },
    "ViT-B-16-SigLIP-tanhgelu": {"model_type": "siglip"},
    "ViT-SO400M-14-SigLIP-384-tanhgelu": {
        "model_type": "siglip",
        VISION: SO400M | {"image_size": 384, "patch_size": 14},
        TEXT: SO400M,
    },
    "ViT-gopt-16-SigLIP2-384-tanhgelu": {
        "model_type": "siglip",
        VISION: GIANT | {"image_size": 384},
        TEXT: SO400M | {"vocab_size": 256_000, "projection_size": 1536},
    },
    "ViT-B-16-SigLIP2-NaFlex": {"model_type": "siglip2", TEXT: {"vocab_size": 256_000}},
    "ViT-SO400M-16-SigLIP2-NaFlex": {"model_type": "siglip2", VISION: SO400M, TEXT: SO400M | {"vocab_size": 256_000}},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_are_the_named_models(name: str) -> None:
    config, named = transformers_config(PUBLISHED[name]), get_config(name)
    with torch.device("meta"):
        ours, theirs = (CLIP(sizes).state_dict() for sizes in (config, named))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for field in ("vision_approximate", "text_approximate", "embed_dim", "init_logit_bias"):
        assert getattr(config, field) == getattr(named, field)
    for field in ("heads", "norm_eps", "pool_type", "naflex", "image_size"):
        assert getattr(config.vision_cfg, field) == getattr(named.vision_cfg, field)
    for field in ("heads", "norm_eps", "pool_type", "no_causal_mask", "context_length"):
        assert getattr(config.text_cfg, field) == getattr(named.text_cfg, field)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "blip"}, "model_type: got 'blip', expected a whole model's, one of 'clip', 'metaclip_2'"),
        (
            {"model_type": "siglip_vision_model"},
            "model_type: got 'siglip_vision_model', an image tower alone, expected a whole model's",
        ),
        (
            {"architecture": "vit_base_patch16_siglip_224"},
            "got none, in a configuration of timm's 'vit_base_patch16_siglip_224', an image tower alone",
        ),
        ({"model_type": "siglip", "quantization_config": {"bits": 4}}, "quantization_config: got one"),
        ({"model_type": "siglip", VISION: [1]}, "vision_config: got list, expected an object"),
        ({"model_type": "siglip", VISION: {"vision_use_head": False}}, "vision_config.vision_use_head: got False"),
        ({"model_type": "siglip", VISION: {"num_channels": 1}}, "vision_config.num_channels: got 1, expected 3"),
        (
            {"model_type": "siglip", VISION: {"hidden_act": "relu"}},
            "vision_config.hidden_act: got 'relu', expected one",
        ),
        ({"model_type": "siglip", TEXT: {"hidden_act": "swish"}}, "text_config.hidden_act: got 'swish', expected one"),
        ({"model_type": "siglip", TEXT: {"projection_size": 512}}, "projection_size: got 512, expected 768"),
        ({"model_type": "siglip", VISION: {"hidden_size": 1536}}, "projection_size: got 768, expected 1536"),
        ({"model_type": "siglip", TEXT: {"attention_dropout": 0.1}}, "text_config.attention_dropout: got 0.1"),
        (
            {"model_type": "siglip", VISION: {"num_attention_heads": 7}},
            "num_attention_heads: got 7, expected a divisor",
        ),
        ({"model_type": "siglip", VISION: {"layer_norm_eps": "small"}}, "layer_norm_eps: got 'small'"),
        ({"model_type": "siglip", VISION: {"patch_size": [16, 14]}}, r"patch_size: got \[16, 14\], expected a square"),
        ({"model_type": "siglip", VISION: {"image_size": "large"}}, "image_size: got 'large', expected pixels"),
        ({"model_type": "siglip", TEXT: {"vocab_size": None}}, "vocab_size: got None, expected a whole number"),
        ({"model_type": "siglip2", VISION: {"num_patches": 200}}, "num_patches: got 200, expected a square"),
        ({"model_type": "clip", "projection_dim": None}, "projection_dim: got None, expected a whole number"),
        ({"model_type": "metaclip_2", TEXT: {"eos_token_id": [1, 2]}}, r"eos_token_id: got \[1, 2\], expected one id"),
    ],
)
def test_what_is_not_computed_is_refused_by_its_name(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        transformers_config(values)
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        clipfast.create_model(tmp_path)


MODELS = {
    "siglip": (lambda: transformers.SiglipModel(tiny_siglip.siglip_config()), tiny_siglip.SIGLIP),
    "siglip2": (lambda: transformers.Siglip2Model(tiny_siglip.siglip2_config()), tiny_siglip.NAFLEX),
    "metaclip_2": (lambda: transformers.MetaClip2Model(tiny_siglip.metaclip2_config()), tiny.CONFIG),
    "clip": (tiny.transformers_clip, tiny.CONFIG),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_transformers_opens(kind: str, tmp_path: Path) -> None:
    make, config = MODELS[kind]
    theirs = tiny_siglip.drawn(make()).float()
    theirs.save_pretrained(tmp_path)
    model = open_model(tmp_path)
    made = clipfast.create_model(tmp_path, weights=tmp_path)
    assert made.config == model.config
    expected = clipfast.create_model(config)
    clipfast.load_weights(expected, theirs.state_dict())
    tiny.assert_same_state(model.state_dict(), expected.state_dict())
    tiny.assert_same_state(made.state_dict(), expected.state_dict())
    assert not any(p.requires_grad for p in model.parameters())
    assert clipfast.create_model(tmp_path).training


def test_a_file_of_transformers_configuration(tmp_path: Path) -> None:
    MODELS["siglip"][0]().save_pretrained(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "siglip.json")
    made = clipfast.create_model(tmp_path / "siglip.json", weights=tmp_path / "model.safetensors")
    opened = open_model(tmp_path / "siglip.json", tmp_path / "model.safetensors")
    assert made.config == opened.config
    tiny.assert_same_state(made.state_dict(), opened.state_dict())
    (tmp_path / "siglip.json").write_text(json.dumps({"model_type": "blip"}))
    for opened in (clipfast.create_model, lambda path: open_model(path, "w.pt")):
        with pytest.raises(ValueError, match=r"siglip\.json.*model_type: got 'blip'"):
            opened(tmp_path / "siglip.json")


def test_dropout_of_attention_is_refused_in_training_alone(tmp_path: Path) -> None:
    theirs = MODELS["siglip"][0]()
    theirs.config.text_config.attention_dropout = 0.1
    theirs.save_pretrained(tmp_path)
    assert open_model(tmp_path).config.text_cfg.width == 48
    with pytest.raises(ValueError, match=r"config\.json: text_config\.attention_dropout: got 0\.1, expected 0"):
        clipfast.create_model(tmp_path, weights=tmp_path)


def open_clip_folder(folder: Path, theirs: nn.Module, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {"size": 32}}))
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, folder / "open_clip_model.safetensors")


def test_a_folder_of_open_clip_opens(tmp_path: Path) -> None:
    theirs = tiny.open_clip_clip()
    open_clip_folder(tmp_path, theirs, tiny.CONFIG)
    tiny.assert_same_state(open_model(tmp_path).state_dict(), theirs.state_dict())
    made = clipfast.create_model(str(tmp_path), weights=tmp_path, image_size=64)
    assert made.visual.image_size == (64, 64)


def test_of_several_configurations_that_of_the_weights_counts(tmp_path: Path) -> None:
    """A folder may hold both libraries' files; which weights are read says which configuration is."""
    theirs = tiny.open_clip_clip(quick_gelu=True)
    open_clip_folder(tmp_path, theirs, tiny.CONFIG | {"quick_gelu": True})
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_base_patch16_siglip_224"}))
    assert folder_config(tmp_path).approximate == "quick"
    (tmp_path / "open_clip_config.json").rename(tmp_path / "aside.json")
    tiny.transformers_clip().save_pretrained(tmp_path)
    (tmp_path / "aside.json").rename(tmp_path / "open_clip_config.json")
    assert folder_config(tmp_path).approximate == "none"
    small.run(tmp_path)
    assert folder_config(tmp_path) == clipfast.CLIPConfig.from_dict(small.CONFIG)


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}", "[" * 100_000], ids=["empty", "cut", "list", "none", "deep"])
@pytest.mark.parametrize("name", ["config.json", "open_clip_config.json", "model.json"])
def test_a_corrupt_configuration(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    for opened in (clipfast.create_model, open_model):
        with pytest.raises(ValueError, match=rf"{name}"):
            opened(tmp_path)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps(tiny.CONFIG), encoding="utf-8-sig")
    assert clipfast.create_model(tmp_path / "own.json").config == clipfast.CLIPConfig.from_dict(tiny.CONFIG)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}), encoding="utf-8-sig")
    assert folder_config(tmp_path).approximate == "quick"


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    for opened in (clipfast.create_model, open_model):
        with pytest.raises(FileNotFoundError, match=r"expected model\.json.*open_clip_config\.json.* or config\.json"):
            opened(tmp_path)


def test_a_name_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that happens to be called like a model does not hide it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32").mkdir()
    with torch.device("meta"):
        assert clipfast.create_model("ViT-B-32", device="meta").visual.patch_size == 32
