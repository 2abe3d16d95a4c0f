"""Small models of transformers beside CLIP: SigLIP, SigLIP 2, MetaCLIP 2 and LLaVA, and arguments of their calls."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from rivals import captions
from tiny import drawn
from torch import nn

_BLOCKS = {"hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGES = {**_BLOCKS, "image_size": 32, "patch_size": 8}
PATCHES = {**_BLOCKS, "num_patches": 16, "patch_size": 4}
TEXTS = {**_BLOCKS, "vocab_size": 100, "max_position_embeddings": 16, "bos_token_id": 98, "eos_token_id": 99}
# a batch of five aspect ratios, the first without padding
GRIDS = [(4, 4), (2, 6), (3, 5), (1, 7), (5, 2)]


def siglip() -> nn.Module:
    """Return ``SiglipModel``."""
    config = transformers.SiglipConfig(vision_config=IMAGES, text_config=TEXTS | {"projection_size": 64})
    return drawn(transformers.SiglipModel(config))


def siglip_vision(**options: Any) -> nn.Module:
    """Return ``SiglipVisionModel``."""
    return drawn(transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGES | options)))


def siglip_text() -> nn.Module:
    """Return ``SiglipTextModel`` with a head of another width."""
    return drawn(transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXTS, projection_size=32)))


def siglip_classifier() -> nn.Module:
    """Return ``SiglipForImageClassification``."""
    config = transformers.SiglipConfig(vision_config=IMAGES, text_config=TEXTS, num_labels=5)
    return drawn(transformers.SiglipForImageClassification(config))


def siglip2() -> nn.Module:
    """Return ``Siglip2Model``."""
    config = transformers.Siglip2Config(vision_config=PATCHES, text_config=TEXTS | {"projection_size": 64})
    return drawn(transformers.Siglip2Model(config))


def siglip2_vision(**options: Any) -> nn.Module:
    """Return ``Siglip2VisionModel``."""
    return drawn(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**PATCHES | options)))


def siglip2_classifier() -> nn.Module:
    """Return ``Siglip2ForImageClassification``."""
    config = transformers.Siglip2Config(vision_config=PATCHES, text_config=TEXTS, num_labels=5)
    return drawn(transformers.Siglip2ForImageClassification(config))


def metaclip_2(eos_id: int = 2) -> nn.Module:
    """Return ``MetaClip2Model``, whose EOS id is 2 in the released configurations too."""
    config = transformers.MetaClip2Config(
        vision_config=IMAGES, text_config=TEXTS | {"eos_token_id": eos_id}, projection_dim=32
    )
    return drawn(transformers.MetaClip2Model(config))


def metaclip_2_tower(kind: str) -> nn.Module:
    """Return a tower of MetaCLIP 2, with its projection or a classifier behind it, by the class's name."""
    cls = getattr(transformers, kind)
    if "Classification" in kind:
        config = transformers.MetaClip2Config(vision_config=IMAGES, text_config=TEXTS, num_labels=5)
    elif "Text" in kind:
        config = transformers.MetaClip2TextConfig(**TEXTS | {"eos_token_id": 2}, projection_dim=32)
    else:
        config = transformers.MetaClip2VisionConfig(**IMAGES, projection_dim=32)
    return drawn(cls(config))


def llava(vision: Any, layer: int | list[int] = -2, strategy: str = "full", **options: Any) -> nn.Module:
    """Return ``LlavaForConditionalGeneration`` over an image tower of this configuration."""
    language = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=100, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=language, image_token_id=7, vision_feature_layer=layer,
        vision_feature_select_strategy=strategy, **options,
    )  # fmt: skip
    return drawn(transformers.LlavaForConditionalGeneration(config))


def paligemma() -> nn.Module:
    """Return ``PaliGemmaForConditionalGeneration``, which reads all tokens of an image tower without a head."""
    vision = transformers.SiglipVisionConfig(**IMAGES, vision_use_head=False)
    language = transformers.GemmaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, vocab_size=100, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=language, image_token_id=7, projection_dim=64, hidden_size=64
    )
    return drawn(transformers.PaliGemmaForConditionalGeneration(config))


def images(dtype: torch.dtype, size: int = 32) -> dict[str, Any]:
    """Return three images."""
    return {"pixel_values": torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(3)).to(dtype)}


def ids(dtype: torch.dtype) -> dict[str, Any]:
    """Return three captions."""
    return {"input_ids": captions(3, 16, 100)}


def pair(dtype: torch.dtype) -> dict[str, Any]:
    """Return images and captions."""
    return images(dtype) | ids(dtype) | {"return_loss": True}


def patches(dtype: torch.dtype, grids: list[tuple[int, int]] | None = None, most: int = 16) -> dict[str, Any]:
    """Return padded patches of pictures as SigLIP 2's processor gives them."""
    grids = GRIDS if grids is None else grids
    pixel_values = torch.zeros(len(grids), most, 48, dtype=dtype)
    mask = torch.zeros(len(grids), most, dtype=torch.int32)
    generator = torch.Generator().manual_seed(3)
    for i, (rows, columns) in enumerate(grids):
        pixel_values[i, : rows * columns] = torch.randn(rows * columns, 48, generator=generator).to(dtype)
        mask[i, : rows * columns] = 1
    return {"pixel_values": pixel_values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(grids)}


def patches_and_ids(dtype: torch.dtype) -> dict[str, Any]:
    """Return padded patches and captions."""
    return patches(dtype) | {"input_ids": captions(5, 16, 100), "return_loss": True}
