"""transformers' ``Siglip2VisionModel`` under clipfast's keys."""

from __future__ import annotations

import torch
from torch import Tensor

_NAMES = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("self_attn.", "attn."),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
    ("post_layernorm", "ln_post"),
    ("head.attention", "attn_pool.attn"),
    ("head.layernorm", "attn_pool.ln"),
    ("head.mlp", "attn_pool.mlp"),
    ("head.probe", "attn_pool.probe"),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("embeddings.patch_embedding", "conv1"),
)


def clipfast_keys(state: dict[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Return the tensors of a tower, or their gradients, under the keys of ``clipfast.ViT``."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        for old, new in _NAMES:
            key = key.replace(old, new)
        if key == "conv1.weight":
            value = value.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2)
        found[key] = value.flatten() if key == "attn_pool.probe" else value
    for key in [key for key in found if "q_proj" in key]:
        parts = [found.pop(key.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        found[key.replace("q_proj.", "in_proj_")] = torch.cat(parts)
    return found
