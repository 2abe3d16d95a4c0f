"""open_clip's models with few layers, whatever their image tower, and their tensors under clipfast's keys."""

from __future__ import annotations

import copy
import re

import open_clip
import timm
import torch
from torch import Tensor, nn

import clipfast


def few_layers(name: str, layers: int = 2, grid: int = 4, words: int = 100) -> tuple[nn.Module, clipfast.CLIPConfig]:
    """Return open_clip's model of a name, and its configuration here.

    Args:
        name: open_clip's.
        layers: Of both towers.
        grid: Patches a side.
        words: Of the vocabulary.
    """
    config = copy.deepcopy(open_clip.get_model_config(name))
    custom = config.pop("custom_text", False)
    vision, text = config["vision_cfg"], config["text_cfg"]
    text |= {"layers": layers, "vocab_size": words}
    model = vision.get("timm_model_name")
    size = grid * int(re.search(r"patch(\d+)", model)[1] if model else vision["patch_size"])
    vision["image_size"] = size
    if not model:
        vision["layers"] = layers
        kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        return kind(**config), clipfast.CLIPConfig.from_dict(config)
    theirs = clipfast.CLIPConfig.from_dict(config).to_dict()
    theirs["vision_cfg"]["layers"] = layers
    # as open_clip builds it, but for the depth and the size, which it does not pass on
    with torch.device("meta"):
        rival = open_clip.CustomTextCLIP(**config)
    rival.visual.trunk = timm.create_model(model, num_classes=0, global_pool="map", depth=layers, img_size=size)
    rival.text = open_clip.model._build_text_tower(config["embed_dim"], text)
    for scalar in ("logit_scale", "logit_bias"):
        setattr(rival, scalar, nn.Parameter(torch.tensor(1.0)))
    return rival, clipfast.CLIPConfig.from_dict(theirs)


_VISION = (
    ("patch_embed.proj.", "conv1."),
    ("pos_embed", "positional_embedding"),
    ("attn_pool.latent", "attn_pool.probe"),
    ("attn_pool.proj.", "attn_pool.attn.out_proj."),
    ("attn_pool.norm.", "attn_pool.ln."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
    ("blocks.", "transformer.resblocks."),
    ("attn.qkv.", "attn.in_proj_"),
    (".attn.proj.", ".attn.out_proj."),
    (".norm1.", ".ln_1."),
    (".norm2.", ".ln_2."),
)


def clipfast_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's tensors, or gradients, under clipfast's keys."""
    found = {}
    for key, value in state.items():
        if key.startswith("text."):  # a CustomTextCLIP's
            found[key.removeprefix("text.")] = value
        elif key.startswith("visual.trunk."):
            name = key.removeprefix("visual.trunk.")
            if name.startswith(("attn_pool.q.", "attn_pool.kv.")):
                continue
            if name.startswith("norm."):
                name = "ln_post." + name.removeprefix("norm.")
            for old, new in _VISION:
                name = name.replace(old, new)
            found[f"visual.{name}"] = value.flatten(0, -2) if name == "positional_embedding" else value
        else:
            found[key] = value
    probe = found.get("visual.attn_pool.probe")
    if probe is not None:
        found["visual.attn_pool.probe"] = probe.flatten()
        for kind in ("weight", "bias"):
            parts = [state[f"visual.trunk.attn_pool.{part}.{kind}"] for part in ("q", "kv")]
            found[f"visual.attn_pool.attn.in_proj_{kind}"] = torch.cat(parts)
    return found
