"""The libraries' small models for what users do to them: plain and accelerated, with equal weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import open_clip
import timm
import tiny
import tiny_towers
import torch
from rivals import captions
from timm.models import vision_transformer as timm_vit
from torch import nn
from torchvision.models import vision_transformer as torchvision_vit
from transformers.models.clip import modeling_clip
from transformers.models.siglip2 import modeling_siglip2
from user_actions import COMMON_ATTRIBUTES, COMMON_FUNCTIONS, Subject

import clipfast
from clipfast.modules import block


def images(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)


def subject(
    make: Callable[[], nn.Module],
    inputs: Callable[[torch.dtype], dict[str, Any]],
    functions: list[tuple[Any, str]],
    attributes: dict[type, list[tuple[str, Any]]],
    targets: list[str],
) -> Subject:
    torch.manual_seed(0)
    plain = make().double()
    other = copy.deepcopy(plain)
    if not isinstance(plain, clipfast.CLIP):
        clipfast.accelerate(other)
    return Subject([plain, other], inputs, functions, COMMON_ATTRIBUTES | attributes, targets)


def mask_of(old: torch.Tensor) -> torch.Tensor:
    changed = old.clone()
    changed[:, 1] = 0.0
    return changed


OPEN_CLIP = partial(
    subject,
    tiny.open_clip_clip,
    lambda dtype: {"image": images(dtype), "text": captions(2, 16, 100)},
    [
        *COMMON_FUNCTIONS,
        (open_clip.model, "text_global_pool"),
        (open_clip.transformer.ResidualAttentionBlock, "attention"),
        (open_clip.transformer.VisionTransformer, "_embeds"),
        (open_clip.transformer.VisionTransformer, "_pool"),
        (open_clip.transformer.VisionTransformer, "_global_pool"),
        (open_clip.transformer.VisionTransformer, "forward"),
        (open_clip.transformer.Transformer, "forward"),
        (open_clip.CLIP, "encode_text"),
        (torch.nn.functional, "multi_head_attention_forward"),
        (nn.MultiheadAttention, "forward"),
        (nn.Sequential, "forward"),
    ],
    {
        open_clip.CLIP: [("attn_mask", mask_of), ("text_pool_type", "last")],
        open_clip.transformer.VisionTransformer: [("pool_type", "avg"), ("final_ln_after_pool", True)],
        open_clip.transformer.Transformer: [("grad_checkpointing", True)],
    },
    ["attn", "c_fc", "c_proj"],
)
TRANSFORMERS = partial(
    subject,
    tiny.transformers_clip,
    lambda dtype: {"pixel_values": images(dtype), "input_ids": captions(2, 16, 100)},
    [
        *COMMON_FUNCTIONS,
        (modeling_clip, "eager_attention_forward"),
        (modeling_clip.CLIPAttention, "forward"),
        (modeling_clip.CLIPTextModel, "forward"),
        (modeling_clip.CLIPVisionModel, "forward"),
        (modeling_clip.CLIPEncoder, "forward"),
        (modeling_clip.CLIPTextEmbeddings, "forward"),
        (modeling_clip.CLIPEncoderLayer, "__call__"),
        (nn.functional, "embedding"),
    ],
    {
        modeling_clip.CLIPAttention: [
            ("head_dim", 16),
            ("scale", 0.5),
            ("num_heads", 1),
            ("dropout", 0.5),
            ("is_causal", True),
        ],
        modeling_clip.CLIPTextModel: [("eos_token_id", 2)],
    },
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
)
TRANSFORMERS_SIGLIP = partial(
    subject,
    tiny_towers.siglip2,
    lambda dtype: (
        tiny_towers.patches(dtype)
        | {"input_ids": captions(5, 16, 100), "output_hidden_states": [-2], "return_dict": True}
    ),
    [
        *COMMON_FUNCTIONS,
        (modeling_siglip2, "eager_attention_forward"),
        (modeling_siglip2.Siglip2Attention, "forward"),
        (modeling_siglip2.Siglip2TextModel, "forward"),
        (modeling_siglip2.Siglip2VisionModel, "forward"),
        (modeling_siglip2.Siglip2Encoder, "forward"),
        (modeling_siglip2.Siglip2MultiheadAttentionPoolingHead, "forward"),
        (modeling_siglip2.Siglip2EncoderLayer, "__call__"),
        (nn.functional, "interpolate"),
        (nn.functional, "multi_head_attention_forward"),
    ],
    {
        modeling_siglip2.Siglip2Attention: [("head_dim", 16), ("scale", 0.5), ("dropout", 0.5), ("is_causal", True)],
        modeling_siglip2.Siglip2VisionModel: [("use_head", False)],
        nn.MultiheadAttention: [("num_heads", 1), ("head_dim", 16), ("dropout", 0.5)],
    },
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
)
TIMM = partial(
    subject,
    tiny.timm_vit,
    lambda dtype: {"x": images(dtype)},
    [
        *COMMON_FUNCTIONS,
        (timm.layers.Attention, "forward"),
        (timm.layers.Mlp, "forward"),
        (timm_vit.VisionTransformer, "_pos_embed"),
        (timm_vit.VisionTransformer, "pool"),
        (timm_vit.VisionTransformer, "forward_head"),
        (timm_vit.VisionTransformer, "forward_features"),
        (timm_vit.Block, "forward"),
        (nn.Sequential, "forward"),
    ],
    {
        timm.layers.Attention: [("num_heads", 1), ("head_dim", 16), ("scale", 0.5), ("fused_attn", False)],
        timm_vit.VisionTransformer: [("global_pool", "avg"), ("num_prefix_tokens", 2)],
    },
    ["qkv", "attn.proj", "fc1", "fc2"],
)


SIGLIP = partial(
    subject,
    tiny.open_clip_siglip,
    lambda dtype: {"image": images(dtype), "text": captions(2, 16, 100)},
    [
        *COMMON_FUNCTIONS,
        (timm.layers.AttentionPoolLatent, "forward"),
        (timm.layers.attention_pool, "maybe_add_mask"),
        (timm.layers.Attention, "forward"),
        (timm_vit.VisionTransformer, "pool"),
        (timm_vit.VisionTransformer, "forward_head"),
        (timm_vit.VisionTransformer, "forward_features"),
        (open_clip.transformer, "text_global_pool"),
        (open_clip.transformer.TextTransformer, "forward"),
        (open_clip.transformer.TextTransformer, "_embeds"),
        (open_clip.transformer.Transformer, "forward"),
        (open_clip.timm_model.TimmModel, "forward"),
        (nn.MultiheadAttention, "forward"),
    ],
    {
        timm.layers.AttentionPoolLatent: [
            ("num_heads", 1),
            ("head_dim", 16),
            ("latent_len", 2),
            ("scale", 0.5),
            ("fused_attn", False),
            ("pool", "avg"),
            ("pool", ""),
            ("note", "mine"),
        ],
        timm_vit.VisionTransformer: [("global_pool", "avg"), ("pool_include_prefix", True), ("attn_pool", None)],
        open_clip.transformer.TextTransformer: [("pool_type", "first"), ("pool_type", "argmax"), ("eos_id", 3)],
    },
    ["kv", "attn_pool.q", "attn_pool.proj", "qkv", "resblocks.0.attn", "resblocks.2.attn", "c_fc", "fc1", "fc2"],
)


def torchvision_model() -> nn.Module:
    model = tiny.drawn(torchvision_vit.VisionTransformer(32, 16, 2, 2, 64, 128, num_classes=8))
    nn.init.normal_(model.heads.head.weight)  # which starts at zero
    return model


TORCHVISION = partial(
    subject,
    torchvision_model,
    lambda dtype: {"x": images(dtype)},
    [
        *COMMON_FUNCTIONS,
        (torchvision_vit.EncoderBlock, "forward"),
        (torchvision_vit.Encoder, "forward"),
        (torchvision_vit.VisionTransformer, "_process_input"),
        (torchvision_vit.VisionTransformer, "forward"),
        (torch.nn.functional, "multi_head_attention_forward"),
        (nn.MultiheadAttention, "forward"),
        (nn.Sequential, "forward"),
    ],
    {},
    ["self_attention", "mlp.0", "mlp.3"],
)
OWN = partial(
    subject,
    tiny.clip,
    lambda dtype: {"image": images(dtype), "text": captions(2, 16, 100)},
    [
        (block.SelfAttention, "qkv_parameters"),
        (block.ResidualAttentionBlock, "forward"),
        (block.LayerNorm, "forward"),
        (block.MLP, "forward"),
    ],
    {block.SelfAttention: [("heads", 1), ("causal", lambda old: not old)]},
    ["out_proj", "c_fc", "c_proj"],
)
LIBRARIES = {
    "open_clip": OPEN_CLIP,
    "transformers": TRANSFORMERS,
    "transformers siglip": TRANSFORMERS_SIGLIP,
    "timm": TIMM,
    "siglip": SIGLIP,
    "torchvision": TORCHVISION,
    "clipfast": OWN,
}
