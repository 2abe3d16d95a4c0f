"""One small CLIP as each library builds it, with no weight left at the 0 or 1 where it starts."""

from __future__ import annotations

from unittest import mock

import open_clip
import timm
import torch
import transformers
from torch import Tensor, nn

import clipfast

CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 48, "heads": 2, "layers": 3},
}
SIGLIP_CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 32,
        "timm_model_name": "vit_base_patch16_siglip_224",
        "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": CONFIG["text_cfg"]
    | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "act_kwargs": {"approximate": "tanh"}}
    | {"norm_kwargs": {"eps": 1e-6}},
    "init_logit_bias": -10.0,
}
QUICK_CONFIG = CONFIG | {"approximate": "quick"}
RESNET_CONFIG = CONFIG | {"vision_cfg": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8}}

_TRANSFORMERS_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 32,
}
_TRANSFORMERS_TEXT = {
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "projection_dim": 32,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 0,
}


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move every bias, norm and scalar of ``model`` from where it starts, and return it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict(keep_vars=True).values():
            if value.dim() < 2 and value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=generator) - 0.1)
    return model


def clip(config: dict = CONFIG, dtype: torch.dtype = torch.float32) -> clipfast.CLIP:
    """Return clipfast's ``CLIP``, with other weights than the rivals'."""
    return drawn(clipfast.create_model(config, dtype=dtype), seed=1)


def vit(**changes: object) -> clipfast.ViT:
    """Return clipfast's image tower."""
    sizes = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "heads": 2, "output_dim": 32}
    return clipfast.ViT(**(sizes | changes))


def text_transformer(**changes: object) -> clipfast.TextTransformer:
    """Return clipfast's text tower."""
    sizes = {"context_length": 16, "vocab_size": 100, "width": 48, "layers": 3, "heads": 2, "output_dim": 32}
    return clipfast.TextTransformer(**(sizes | changes))


def open_clip_clip(*, custom_text: bool = False, resnet: bool = False, **changes: object) -> nn.Module:
    """Return open_clip's ``CLIP`` or ``CustomTextCLIP``."""
    kind = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    return drawn(kind(**(RESNET_CONFIG if resnet else CONFIG), **changes))


def open_clip_siglip(**changes: object) -> nn.Module:
    """Return open_clip's SigLIP, whose image tower is timm's, made with further arguments."""
    create = timm.create_model
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2} | changes

    def small(name: str, **options: object) -> nn.Module:
        return create(name, **(options | sizes))

    with mock.patch.object(open_clip.timm_model.timm, "create_model", small):
        return drawn(open_clip.CustomTextCLIP(**SIGLIP_CONFIG))


def transformers_clip(hidden_act: str = "gelu") -> nn.Module:
    """Return transformers' ``CLIPModel``."""
    return drawn(
        transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config=_TRANSFORMERS_VISION | {"hidden_act": hidden_act},
                text_config=_TRANSFORMERS_TEXT | {"hidden_act": hidden_act},
                projection_dim=32,
            )
        )
    )


def transformers_vision(projection: bool, hidden_act: str = "gelu") -> nn.Module:
    """Return transformers' ``CLIPVisionModel``, or ``CLIPVisionModelWithProjection``."""
    kind = transformers.CLIPVisionModelWithProjection if projection else transformers.CLIPVisionModel
    return drawn(kind(transformers.CLIPVisionConfig(**_TRANSFORMERS_VISION, hidden_act=hidden_act)))


def transformers_text(projection: bool, hidden_act: str = "gelu") -> nn.Module:
    """Return transformers' ``CLIPTextModel``, or ``CLIPTextModelWithProjection``."""
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return drawn(kind(transformers.CLIPTextConfig(**_TRANSFORMERS_TEXT, hidden_act=hidden_act)))


def timm_vit(num_classes: int = 32, name: str = "vit_base_patch32_clip_224") -> nn.Module:
    """Return timm's CLIP ViT; its head's bias is zero, as in timm's own conversions of CLIP."""
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model = drawn(timm.create_model(name, num_classes=num_classes, **sizes))
    if num_classes:
        nn.init.zeros_(model.head.bias)
    return model


def cloned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict that shares nothing with the one given."""
    return {k: v.detach().clone() for k, v in state.items()}


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Check keys, dtypes, shapes and bits."""
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, f"{key}: {actual[key].dtype}, not {value.dtype}"
        assert actual[key].shape == value.shape, f"{key}: {tuple(actual[key].shape)}, not {tuple(value.shape)}"
        assert torch.equal(_bits(actual[key]), _bits(value)), key


def _bits(value: Tensor) -> Tensor:
    return value.detach().reshape(-1).contiguous().view(torch.uint8)
