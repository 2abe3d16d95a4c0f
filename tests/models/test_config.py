"""Named models and models of one's own sizes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import clipfast
from clipfast.models.config import get_config

# millions of parameters, as open_clip counts them
PARAMETERS = {
    "ViT-B-32": 151.277313,
    "ViT-B-16": 149.620737,
    "ViT-L-14": 427.616513,
    "ViT-L-14-336": 427.944193,
    "ViT-H-14": 986.109441,
    "ViT-bigG-14": 2539.567105,
    "RN50": 102.007137,
    "RN101": 119.688033,
    "RN50x4": 178.300601,
    "RN50x16": 290.979217,
    "RN50x64": 623.258305,
}
SMALL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 100, "width": 32, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    for suffix in ("", "-quickgelu"):
        with torch.device("meta"):
            model = clipfast.CLIP(get_config(name + suffix))
        assert sum(p.numel() for p in model.parameters()) == round(PARAMETERS[name] * 1e6)
        assert model.transformer.resblocks[0].mlp.approximate == ("quick" if suffix else "none")


def test_every_name_is_listed() -> None:
    names = clipfast.list_models()
    assert names[: 2 * len(PARAMETERS)] == [*PARAMETERS, *(f"{n}-quickgelu" for n in PARAMETERS)]
    assert len(set(names)) == len(names)


def test_names_as_siglip_was_trained() -> None:
    """The tanh GELU in both towers, and logits that start at ``10 · cos − 10``; else as the plain name."""
    plain = [name for name in clipfast.list_models() if "SigLIP" in name and not name.endswith(("-tanhgelu", "NaFlex"))]
    assert len(plain) == 26
    for name in plain:
        config, trained = get_config(name), get_config(f"{name}-tanhgelu")
        assert trained.vision_approximate == trained.text_approximate == "tanh"
        assert math.isclose(trained.init_logit_scale, math.log(10))
        assert (config.init_logit_scale, config.init_logit_bias, trained.init_logit_bias) == (None, -10, -10)
        towers = (
            replace(getattr(trained, part), approximate=getattr(config, part).approximate)
            for part in ("vision_cfg", "text_cfg")
        )
        assert tuple(towers) == (config.vision_cfg, config.text_cfg)
    # timm's towers with the tanh GELU, and SigLIP 2's text
    tanh = {name for name in plain if get_config(name).vision_approximate == "tanh"}
    assert tanh == {n for n in plain if "SO400M-16" in n or "gopt" in n or "B-32" in n}
    assert {n for n in plain if get_config(n).text_approximate == "tanh"} == {n for n in plain if "SigLIP2" in n}


def test_naflex_names() -> None:
    for name, width in (("ViT-B-16-SigLIP2-NaFlex", 768), ("ViT-SO400M-16-SigLIP2-NaFlex", 1152)):
        config = get_config(name)
        vision = config.vision_cfg
        assert (vision.naflex, vision.width, vision.image_size // vision.patch_size) == (True, width, 16)
        assert (config.text_cfg.context_length, config.text_cfg.vocab_size) == (64, 256_000)
        assert config.vision_approximate == config.text_approximate == "tanh"


def test_one_model_from_a_dict_a_dataclass_and_a_file(tmp_path: Path) -> None:
    config = clipfast.CLIPConfig(
        embed_dim=32,
        vision_cfg=clipfast.VisionConfig(32, 2, 48, head_width=16, patch_size=8),
        text_cfg=clipfast.TextConfig(12, 100, 32, heads=2, layers=2),
    )
    file = tmp_path / "small.json"
    file.write_text(json.dumps(SMALL))
    hub_file = tmp_path / "open_clip_config.json"
    hub_file.write_text(json.dumps({"model_cfg": SMALL, "preprocess_cfg": {}}))
    assert get_config(SMALL) == config
    assert get_config(file) == get_config(str(file)) == get_config(hub_file) == config
    assert get_config(json.loads(json.dumps(config.to_dict()))) == config
    model = clipfast.create_model(SMALL)
    assert model.encode_image(torch.zeros(1, 3, 32, 32)).shape == (1, 32)


def test_open_clips_quick_gelu_is_understood() -> None:
    assert get_config(SMALL | {"quick_gelu": True}).approximate == "quick"


def test_open_clips_keys_that_are_off_are_passed_over() -> None:
    theirs = {
        "custom_text": True,
        "vision_cfg": SMALL["vision_cfg"]
        | {"attentional_pool": False, "attn_pooler_queries": 256, "timm_model_name": None, "norm_kwargs": None},
        "text_cfg": SMALL["text_cfg"]
        | {"embed_cls": False, "pad_id": 0, "hf_tokenizer_name": "a/b", "tokenizer_kwargs": {"clean": "lower"}}
        | {"norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"}, "hf_proj_type": "mlp"},
    }
    config = get_config(SMALL | theirs)
    assert config.text_cfg == replace(get_config(SMALL).text_cfg, norm_eps=1e-6, approximate="tanh")
    assert config.vision_cfg == get_config(SMALL).vision_cfg


def test_a_resnet_of_ones_own() -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    model = clipfast.create_model(SMALL | {"vision_cfg": vision})
    assert isinstance(model.visual, clipfast.ModifiedResNet)
    assert model.visual.attnpool.heads == 16 * 32 // 64


def test_device_and_dtype() -> None:
    model = clipfast.create_model(SMALL, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}


def test_weights_are_all_taken() -> None:
    source = clipfast.create_model(SMALL)
    model = clipfast.create_model(SMALL, weights=source.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ("ViT-B32", ValueError, "got 'ViT-B32'; did you mean 'ViT-B-32'"),
        ("ViT-B/16", ValueError, "did you mean 'ViT-B-16'"),
        ("what is this", ValueError, r"expected one of ViT-B-32, .*\(\d+ in all\)"),
        ({"embed_dims": 3}, ValueError, "got 'embed_dims'; did you mean 'embed_dim'"),
        ({"vision_cfg": {"qk_norm": True}}, ValueError, "got 'vision_cfg.qk_norm', which is not served"),
        ({"vision_cfg": {"timm_model_name": "convnext_tiny"}}, ValueError, "'convnext_tiny', expected one of timm's"),
        (
            {"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "avg"}},
            ValueError,
            "timm_pool = 'avg' with vit_base_patch16_siglip_224",
        ),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, ValueError, "text_cfg.hf_model_name', which is not served"),
        ({"text_cfg": {"norm_kwargs": {"bias": False}}}, ValueError, "norm_kwargs': got .*, expected .*eps"),
        ({"embed_dim": 512, "text_cfg": {"proj_type": "none", "width": 64}}, ValueError, "'none' with a width of 64"),
        ({"text_cfg": {"proj_type": "mlp"}}, ValueError, "text_cfg.proj_type: got 'mlp', expected 'linear' or 'none'"),
        ({"text_cfg": {"pool_type": "mean"}}, ValueError, r"pool_type\): got 'mean', expected one of 'eos'"),
        ({"vision_cfg": {"pool_type": "none"}}, ValueError, r"pool_type\): got 'none', expected one of 'tok'"),
        ({"text_cfg": 5}, ValueError, "text_cfg: got 5, expected a dict"),
        ({"vision_cfg": None}, ValueError, "vision_cfg: got None, expected a dict"),
        (7, TypeError, "got int, expected a model's name"),
        ({"vision_cfg": {"width": 100}}, ValueError, "head_width: got 64, expected a divisor of the width 100"),
        ({"approximate": "relu"}, ValueError, "got 'relu'"),
    ],
)
def test_wrong_configurations(wrong: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), torch.device("meta"):
        clipfast.create_model(wrong)


def test_the_temperature_starts_and_stays_where_it_should() -> None:
    model = clipfast.create_model(SMALL)
    assert math.isclose(model.logit_scale.item(), math.log(1 / 0.07), rel_tol=1e-6)
    with torch.no_grad():
        model.logit_scale.fill_(7)
    model.clamp_logit_scale()
    assert math.isclose(model.logit_scale.exp().item(), 100, rel_tol=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(-1)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == 0


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("vision_cfg", {"image_size": "224"}, "vision_cfg.image_size: got '224', expected a whole number, at least 1"),
        ("vision_cfg", {"image_size": [224, 0]}, r"vision_cfg.image_size: got \(224, 0\), expected"),
        ("vision_cfg", {"reg_tokens": -1}, "vision_cfg.reg_tokens: got -1, expected a whole number, at least 0"),
        ("vision_cfg", {"patch_size": None}, "vision_cfg.patch_size: got None, expected pixels"),
        ("vision_cfg", {"norm_eps": -1.0}, "vision_cfg.norm_eps: got -1.0, expected a number above 0"),
        ("text_cfg", {"norm_eps": None}, "text_cfg.norm_eps: got None, expected a number above 0"),
        ("text_cfg", {"ls_init_value": "a"}, "text_cfg.ls_init_value: got 'a', expected a number, or None"),
        ("text_cfg", {"vocab_size": 0}, "text_cfg.vocab_size: got 0, expected a whole number, at least 1"),
        # what a ResNet would pass over in silence
        ("vision_cfg", {"layers": [1, 1, 1, 1], "pool_type": "map"}, "vision_cfg.pool_type: got 'map' with a ResNet's"),
        ("vision_cfg", {"layers": [1, 1, 1, 1], "naflex": True}, "vision_cfg.naflex: got True with a ResNet's"),
    ],
)
def test_numbers_that_no_tower_can_have_are_named(part, values, message):
    with pytest.raises(ValueError, match=message):
        clipfast.CLIPConfig.from_dict({part: values})
