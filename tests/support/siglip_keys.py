"""open_clip's SigLIP (a ``CustomTextCLIP`` over timm's image tower) under clipfast's keys."""

from __future__ import annotations

import torch
from torch import Tensor

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
        if key.startswith("text."):
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
