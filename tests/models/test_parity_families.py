"""The towers of SigLIP, SigLIP 2, CLIPA and MetaCLIP 2 compute what open_clip's and timm's compute."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from oracle import relative_error
from siglip_rivals import clipfast_keys, few_layers
from tiny import drawn
from torch import Tensor, nn

import clipfast
from clipfast.models.config import CLIPConfig, get_config

FOLDER = Path(open_clip.__file__).parent / "model_configs"
# one of each kind: head widths of 64, 72, 80 and 104; erf, tanh and quick GELU; MAP, mean and class token; last and EOS
FAMILIES = [
    ("ViT-B-16-SigLIP", 2),
    ("ViT-B-16-SigLIP2", 2),
    ("ViT-SO400M-14-SigLIP", 2),
    ("ViT-L-14-CLIPA", 2),
    ("ViT-L-14-worldwide-quickgelu", 2),
    *(
        pytest.param(name, 2, marks=pytest.mark.exhaustive)
        for name in (
            "ViT-SO400M-16-SigLIP-i18n-256",
            "ViT-bigG-14-CLIPA",
            "ViT-H-14-worldwide",
            "ViT-gopt-16-SigLIP2-256",
        )
    ),
]
THEIRS = [name for name in clipfast.list_models() if (FOLDER / f"{name}.json").is_file()]
# test_config.py counts the classic ones
NEW = [name for name in THEIRS if any(word in name for word in ("SigLIP", "CLIPA", "worldwide", "bigG"))]


def captions(config: CLIPConfig, count: int) -> Tensor:
    """Return ids with an EOS, the largest or not, in every row."""
    text = config.text_cfg
    tokens = torch.randint(3, text.vocab_size - 1, (count, text.context_length))
    ends = torch.randint(1, text.context_length, (count,))
    tokens[torch.arange(count), ends] = text.vocab_size - 1 if text.eos_id is None else text.eos_id
    return tokens


def step(model: nn.Module, images: Tensor, tokens: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return outputs and gradients of one step with the loss that a model was trained with."""
    outputs = model(images, tokens)
    sigmoid = len(outputs) == 4
    if isinstance(model, clipfast.CLIP):
        loss = clipfast.SigLipLoss() if sigmoid else clipfast.ContrastiveLoss()
    else:
        loss = open_clip.loss.SigLipLoss() if sigmoid else open_clip.ClipLoss()
    value = loss(*outputs)
    value.backward()
    names = ("image", "text", "scale", "bias") if sigmoid else ("image", "text", "scale")
    gradients = {k: p.grad for k, p in model.named_parameters()}
    return dict(zip(names, (o.detach() for o in outputs), strict=True)) | {"loss": value.detach()}, gradients


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str]:
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    return max((relative_error(actual[k], expected[k]), k) for k in expected)


@pytest.mark.parametrize(("name", "layers"), FAMILIES)
def test_same_outputs_and_gradients(name: str, layers: int) -> None:
    torch.manual_seed(0)
    rival, config = few_layers(name, layers, grid=3)
    rival = drawn(rival).double()
    model = clipfast.create_model(config, dtype=torch.float64)
    model.load_state_dict(clipfast_keys(rival.state_dict()))
    size = config.vision_cfg.image_size
    images, tokens = torch.randn(3, 3, size, size, dtype=torch.float64), captions(config, 3)
    outputs, gradients = step(rival, images, tokens)
    mine, my_gradients = step(model, images, tokens)
    assert worst(mine, outputs)[0] <= 1e-10, worst(mine, outputs)
    gradients = clipfast_keys(gradients)
    assert worst(my_gradients, gradients)[0] <= 1e-10, worst(my_gradients, gradients)

    with torch.no_grad():
        expected = dict(enumerate(rival.float()(images.float(), tokens)))
        single = model.float().eval()
        for found in (single(images.float(), tokens), single.train()(images.float(), tokens)):
            assert worst(dict(enumerate(found)), expected)[0] <= 2e-6, worst(dict(enumerate(found)), expected)


def test_tokens_of_chosen_blocks() -> None:
    torch.manual_seed(0)
    for name in ("ViT-B-16-SigLIP2", "ViT-L-14-CLIPA"):
        rival, config = few_layers(name, layers=3, grid=2)
        rival = drawn(rival).double().eval()
        model = clipfast.create_model(config, dtype=torch.float64).eval()
        model.load_state_dict(clipfast_keys(rival.state_dict()))
        size = config.vision_cfg.image_size
        images = torch.randn(2, 3, size, size, dtype=torch.float64)
        for options in (
            {"indices": [0, 2], "output_extra_tokens": True},
            {"indices": 1, "normalize_intermediates": True},
        ):
            expected = rival.visual.forward_intermediates(images, **options)
            found = model.visual.forward_intermediates(images, **options)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                for a, b in zip(*((v if isinstance(v, list) else [v]) for v in (found[key], value)), strict=True):
                    assert relative_error(a, b) <= 1e-10, (name, options, key)


def test_what_does_not_fill_a_patch_is_not_read() -> None:
    """As timm's tower of 384 pixels and patches of 14 does it."""
    torch.manual_seed(0)
    rival, config = few_layers("ViT-SO400M-14-SigLIP", layers=1, grid=2)
    values = config.to_dict()
    values["vision_cfg"]["image_size"] = [28 + 6, 28 + 6]
    model = clipfast.create_model(values, dtype=torch.float64)
    model.load_state_dict(clipfast_keys(rival.double().state_dict()))
    images = torch.randn(2, 3, 34, 34, dtype=torch.float64)
    expected = rival.visual(images[..., :28, :28])
    assert relative_error(model.encode_image(images), expected) <= 1e-10
    assert get_config("ViT-SO400M-14-SigLIP-384").vision_cfg.image_size % 14 == 6


def test_every_name_of_these_families_is_known() -> None:
    theirs = [
        n
        for n in open_clip.list_models()
        if n.startswith("ViT") and any(f in n for f in ("SigLIP", "CLIPA", "worldwide", "bigG"))
    ]
    assert len(theirs) > 40
    assert not set(theirs) - set(clipfast.list_models())


@pytest.mark.parametrize("name", NEW)
def test_a_name_is_what_open_clips_file_says(name: str) -> None:
    config = get_config(name)
    assert CLIPConfig.from_dict(json.loads((FOLDER / f"{name}.json").read_text())) == config
    assert get_config(json.loads(json.dumps(config.to_dict()))) == config


def _one_of_each() -> list[object]:
    """Return names; of those that differ in their pictures' size or GELU alone, one that CI runs."""
    seen, found = set(), []
    for name in NEW:
        config = get_config(name)
        kind = (replace(config.vision_cfg, image_size=0, approximate=None), config.text_cfg)
        found.append(pytest.param(name, marks=pytest.mark.exhaustive) if kind in seen else name)
        seen.add(kind)
    return found


@pytest.mark.parametrize("name", _one_of_each())
def test_parameter_counts(name: str) -> None:
    config = open_clip.get_model_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    with torch.device("meta"):
        rival, model = kind(**config), clipfast.CLIP(get_config(name))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in rival.parameters())
    assert {k: v.dtype for k, v in model.state_dict().items()}.keys() == clipfast_keys(rival.state_dict()).keys()
    for scalar in ("logit_scale", "logit_bias"):
        assert (getattr(model, scalar) is None) == (getattr(rival, scalar) is None)
