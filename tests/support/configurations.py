"""Every configuration of open_clip as a shallow model with random weights, and what ``accelerate`` makes of it."""

from __future__ import annotations

import copy
import re
import warnings
from dataclasses import dataclass
from typing import Any
from unittest import mock

import open_clip
import timm
import torch
import transformers
from open_clip import hf_model, timm_model
from torch import Tensor, nn

import clipfast
from clipfast.models.accelerate import Acceleration
from clipfast.models.accelerated import AccelerateWarning

VOCABULARY = 1000
# what those names stand for on a hub
_HF = {
    "roberta-base": transformers.RobertaConfig,
    "xlm-roberta-base": transformers.XLMRobertaConfig,
    "xlm-roberta-large": transformers.XLMRobertaConfig,
    "google/mt5-base": transformers.MT5Config,
    "google/mt5-xl": transformers.MT5Config,
    "facebook/nllb-200-distilled-600M": transformers.M2M100Config,
    "facebook/nllb-200-distilled-1.3B": transformers.M2M100Config,
}
_HF_SIZES = {
    "RobertaConfig": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "XLMRobertaConfig": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64},
    "MT5Config": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "M2M100Config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    | {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64},
}


@dataclass(frozen=True)
class Outcome:
    """What ``accelerate`` made of a configuration.

    Attributes:
        image: "served", or why not.
        text: "served", or why not.
        error: The largest ``max|accelerated − original| / max|original|`` of both towers' features, in float64.
    """

    image: str
    text: str
    error: float


def shallow(name: str) -> nn.Module:
    """Return a configuration's model with one or two blocks a tower, narrow where its own code allows."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    custom = config.pop("custom_text", False)
    vision, text = config["vision_cfg"], config["text_cfg"]
    whole = "multimodal_cfg" in config  # whose widths depend on each other
    if "timm_model_name" not in vision:
        _shrink_vision(vision, narrow=not whole)
    vision.pop("timm_model_pretrained", None)
    if "hf_model_name" in text:
        custom = True
        text["hf_model_pretrained"] = False
    else:
        _shrink_text(text, narrow=not whole)
    if whole:
        config["multimodal_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY}
    kind = open_clip.CoCa if whole else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    with (
        mock.patch.object(timm_model.timm, "create_model", _shallow_timm),
        mock.patch.object(hf_model.AutoConfig, "from_pretrained", _local_config),
    ):
        return kind(**config).double().eval()


def outcome_of(name: str) -> Outcome:
    """Accelerate a configuration's model and compare it with the original."""
    torch.manual_seed(0)
    original = shallow(name)
    # from where they start: weights that begin as zeros or ones tell nothing
    with torch.no_grad():
        for p in original.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model = copy.deepcopy(original)
    images, tokens = pictures_for(original), texts_for(original)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", AccelerateWarning)
        try:
            clipfast.accelerate(model)
            said = "; ".join(str(w.message) for w in told if issubclass(w.category, AccelerateWarning))
        except ValueError as error:
            if "can be accelerated" not in str(error):
                raise
            said = str(error)
    found = clipfast.acceleration(model)
    error = 0.0
    with torch.no_grad():
        for actual, expected in (
            (model.encode_image(images), original.encode_image(images)),
            (model.encode_text(tokens), original.encode_text(tokens)),
        ):
            assert actual.shape == expected.shape
            assert expected.isfinite().all()
            assert expected.count_nonzero()
            error = max(error, float((actual - expected).abs().max() / expected.abs().max()))
    return Outcome(_of_tower(found, said, image=True), _of_tower(found, said, image=False), error)


def pictures_for(model: nn.Module) -> Tensor:
    """Return two pictures in the size that a model takes."""
    visual = model.visual
    trunk = getattr(visual, "trunk", None)
    size = visual.image_size
    if trunk is not None:
        embed = getattr(trunk, "patch_embed", None)
        size = getattr(embed, "img_size", None) or trunk.default_cfg["input_size"][-2:]
    size = (size, size) if isinstance(size, int) else size
    return torch.randn(2, 3, *size, dtype=torch.float64)


def texts_for(model: nn.Module) -> Tensor:
    """Return four texts, ended at different places as a model's tokenizer would."""
    owner = getattr(model, "text", model)
    eos = getattr(owner, "eos_id", None) or getattr(owner, "text_eos_id", None) or VOCABULARY - 1
    # Hugging Face's towers take any length
    own = getattr(owner, "positional_embedding", None) is not None
    length = owner.context_length if own else 20
    tokens = torch.randint(3, VOCABULARY - 1, (4, length))
    tokens[tokens == eos] = 3
    ends = torch.randint(2, length, (4,))
    tokens[torch.arange(4), ends] = eos
    return tokens.masked_fill(torch.arange(length) > ends[:, None], 1)


def _of_tower(found: Acceleration, said: str, image: bool) -> str:
    """Return "served", or the reason that ``accelerate`` gave for leaving a tower alone."""

    def is_its(path: str) -> bool:
        # a pooling is served by itself, behind blocks that are left alone too
        return path.startswith("visual") == image and not path.startswith("text_decoder") and "attn_pool" not in path

    if any(is_its(path) for path in found.accelerated):
        return "served"
    reasons = []
    for path in filter(is_its, found.left_alone):
        others = "|".join(re.escape(other or "the model") for other in found.left_alone if other != path)
        end = rf"(?=; (?:{others}): |\n|$)" if others else r"(?=\n|$)"
        given = re.search(rf"(?:^| ){re.escape(path or 'the model')}: (.*?){end}", said)
        reasons.append(given[1] if given else "no reason")
    return "; ".join(reasons) or "no reason"


def _shrink_vision(vision: dict[str, Any], narrow: bool) -> None:
    if isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
        return
    vision["layers"] = 2
    vision["image_size"] = 3 * vision.get("patch_size", 16)
    if narrow:
        vision["width"] = 2 * vision.get("head_width", 64)


def _shrink_text(text: dict[str, Any], narrow: bool) -> None:
    width, heads = text.get("width", 512), text.get("heads", 8)
    text |= {"layers": 2, "vocab_size": VOCABULARY, "heads": heads, "width": width}
    if narrow:
        text |= {"heads": 2, "width": 2 * (width // heads)}
    if text.get("eos_id", 0) >= VOCABULARY:
        text["eos_id"] = VOCABULARY - 1


_create_timm = timm.create_model


def _shallow_timm(name: str, **options: Any) -> nn.Module:
    stages = (1,) * (5 if name in ("fastvit_mci3", "fastvit_mci4") else 4)
    for fewer in ({"depth": 1}, {"depths": stages}, {"layers": stages}):
        try:
            return _create_timm(name, **options, **fewer)
        except TypeError as error:
            if next(iter(fewer)) not in str(error):
                raise
    return _create_timm(name, **options)


def _local_config(name: str, **_: Any) -> transformers.PretrainedConfig:
    kind = _HF[name]
    return kind(vocab_size=VOCABULARY, **_HF_SIZES[kind.__name__])
