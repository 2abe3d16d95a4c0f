"""One small SigLIP, NaFlex, MetaCLIP 2 and CLIPA as each library builds it, in float64 with weights of float32."""

from __future__ import annotations

from typing import Any

import open_clip
import timm
import tiny
import torch
import transformers
from torch import nn

SIDE, PATCH, TOKENS, VOCAB = 48, 16, 12, 90

VISION = {
    "image_size": SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": PATCH, "mlp_ratio": 2.0,
    "pool_type": "map", "class_token": False, "no_ln_pre": True, "patch_bias": True, "norm_eps": 1e-6,
    "proj_type": "none",
}  # fmt: skip
TEXT = {
    "context_length": TOKENS, "vocab_size": VOCAB, "width": 48, "heads": 2, "layers": 2, "mlp_ratio": 2.0,
    "pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_eps": 1e-6,
}  # fmt: skip
# as transformers and big_vision compute it
SIGLIP = {
    "embed_dim": 64, "vision_cfg": VISION, "text_cfg": TEXT, "approximate": "tanh", "init_logit_bias": -10.0,
}  # fmt: skip
NAFLEX = SIGLIP | {"vision_cfg": VISION | {"naflex": True}}
# as open_clip and timm do
ERF_SIGLIP = SIGLIP | {"approximate": "none"}
CLIPA = tiny.CONFIG | {
    "vision_cfg": tiny.CONFIG["vision_cfg"] | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    "text_cfg": tiny.CONFIG["text_cfg"] | {"pool_type": "last", "no_causal_mask": True},
}

# a ViT of timm's under classic CLIP's text
MEAN = tiny.CONFIG | {
    "embed_dim": 40, "vision_cfg": VISION | {"pool_type": "avg", "proj_type": "linear", "approximate": "none"},
}  # fmt: skip

_SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {"hidden_size": 64, "intermediate_size": 128, "patch_size": PATCH, **_SIZES}
_TEXT = {
    "hidden_size": 48, "intermediate_size": 96, "vocab_size": VOCAB, "max_position_embeddings": TOKENS, **_SIZES,
}  # fmt: skip


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter of ``model`` another value, exact in float32, and return it in float64, in ``eval()``."""
    generator = torch.Generator().manual_seed(seed)
    model = model.float()
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator) + (0.5 if value.dim() < 2 else 0.0))
    return model.double().eval()


def siglip_config(**more: Any) -> transformers.SiglipConfig:
    """Return the configuration of transformers' small SigLIP."""
    return transformers.SiglipConfig(
        vision_config={**_VISION, "image_size": SIDE}, text_config={**_TEXT, "projection_size": 64}, **more
    )


def siglip2_config(**more: Any) -> transformers.Siglip2Config:
    """Return the configuration of transformers' small SigLIP 2 with NaFlex."""
    return transformers.Siglip2Config(
        vision_config={**_VISION, "num_patches": (SIDE // PATCH) ** 2},
        text_config={**_TEXT, "projection_size": 64},
        **more,
    )


def metaclip2_config(**more: Any) -> transformers.MetaClip2Config:
    """Return the configuration of transformers' MetaCLIP 2, of the sizes of ``tiny.CONFIG``."""
    return transformers.MetaClip2Config(
        vision_config={**tiny._TRANSFORMERS_VISION, "hidden_act": "gelu"},
        text_config={**tiny._TRANSFORMERS_TEXT, "hidden_act": "gelu"},
        projection_dim=32,
        **more,
    )


def timm_vit(name: str = "vit_base_patch16_siglip_224", **more: Any) -> nn.Module:
    """Return timm's image tower of SigLIP, small."""
    sizes = {"img_size": SIDE, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0, "num_classes": 0}
    return timm.create_model(name, **(sizes | more))


def open_clip_siglip() -> nn.Module:
    """Return open_clip's ``CustomTextCLIP`` of a timm trunk."""
    text = {k: v for k, v in TEXT.items() if k != "norm_eps"} | {"norm_kwargs": {"eps": 1e-6}}
    vision = {"image_size": SIDE, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "none"}
    model = open_clip.CustomTextCLIP(embed_dim=64, vision_cfg=vision, text_cfg=text, init_logit_bias=-10.0)
    model.visual.trunk = timm_vit()
    return model


def open_clip_mean() -> nn.Module:
    """Return open_clip's ``CustomTextCLIP`` of a timm trunk that pools by the mean, with a projection behind it."""
    vision = {"image_size": SIDE, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"}
    model = open_clip.CustomTextCLIP(embed_dim=40, vision_cfg=vision, text_cfg=tiny.CONFIG["text_cfg"])
    model.visual.trunk = timm_vit("vit_base_patch16_siglip_gap_224")
    return model


def open_clip_clipa(custom_text: bool = False) -> nn.Module:
    """Return open_clip's CLIPA."""
    return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**CLIPA)


def clipfast_vit(**more: Any) -> dict[str, Any]:
    """Return ``clipfast.ViT``'s arguments for SigLIP's image tower."""
    sizes = {k: v for k, v in VISION.items() if k not in ("head_width", "proj_type")}
    return sizes | {"heads": 2, "output_dim": None, "approximate": "tanh"} | more


def images(side: int = SIDE, count: int = 3) -> torch.Tensor:
    """Return a batch of images in float64."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens(count: int = 3) -> torch.Tensor:
    """Return a batch of captions with padding, as SigLIP's tokenizer pads."""
    ids = torch.randint(2, VOCAB, (count, TOKENS), generator=torch.Generator().manual_seed(2))
    ids[0, 5:] = 1
    return ids


def patches(pixels: torch.Tensor) -> torch.Tensor:
    """Return images as SigLIP 2 of transformers takes them: ``[B, N, P·P·3]``, in (row, column, channel) order."""
    rows = pixels.unflatten(2, (-1, PATCH)).unflatten(4, (-1, PATCH))
    return rows.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
