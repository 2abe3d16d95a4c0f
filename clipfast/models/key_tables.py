"""How transformers and timm name what OpenAI's layout names: tables alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Parts = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class KeyTable:
    """How another layout names what OpenAI's names.

    Names are pairs of OpenAI's and the other's. One that ends with a dot or an underscore is the beginning of keys.

    Attributes:
        names: Keys outside blocks.
        stacks: The beginnings of blocks' keys, before a block's number.
        in_block: Keys within a block.
        packed: Packed projections outside blocks, by the beginning of OpenAI's keys: the other's parts in their order,
            each with its share of the rows.
        packed_in_block: The same within a block.
        also: Other names that are read: theirs to OpenAI's.
        transposed: OpenAI's keys of matrices that the other transposes.
        leading_ones: How many dimensions of size 1 the other puts before a tensor, by OpenAI's keys.
    """

    names: Mapping[str, str]
    stacks: Mapping[str, str]
    in_block: Mapping[str, str]
    packed_in_block: Mapping[str, Parts]
    packed: Mapping[str, Parts] = field(default_factory=dict)
    also: Mapping[str, str] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()
    leading_ones: Mapping[str, int] = field(default_factory=dict)


# transformers' classes CLIP, MetaClip2, Siglip and Siglip2
TRANSFORMERS = KeyTable(
    names={
        "logit_scale": "logit_scale",
        "logit_bias": "logit_bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.": "text_model.final_layer_norm.",
        "text_projection": "text_projection.weight",
        "text_projection.weight": "text_model.head.weight",
        "text_projection.bias": "text_model.head.bias",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",  # so spelt there
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.proj": "visual_projection.weight",
        "visual.attn_pool.probe": "vision_model.head.probe",
        "visual.attn_pool.attn.": "vision_model.head.attention.",
        "visual.attn_pool.ln.": "vision_model.head.layernorm.",
        "visual.attn_pool.mlp.c_fc.": "vision_model.head.mlp.fc1.",
        "visual.attn_pool.mlp.c_proj.": "vision_model.head.mlp.fc2.",
    },
    stacks={
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
    },
    in_block={
        "ln_1.": "layer_norm1.",
        "attn.out_proj.": "self_attn.out_proj.",
        "ln_2.": "layer_norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    },
    packed_in_block={"attn.in_proj_": (("self_attn.q_proj.", 1), ("self_attn.k_proj.", 1), ("self_attn.v_proj.", 1))},
    transposed=frozenset({"text_projection", "visual.proj"}),
    leading_ones={"visual.attn_pool.probe": 2},
)

# what only one of transformers' families has a place for, by the beginnings of OpenAI's keys
OF_TRANSFORMERS_CLIP = ("visual.class_embedding", "visual.ln_pre.", "visual.proj")
OF_TRANSFORMERS_SIGLIP = (
    "logit_bias",
    "text_projection.",
    "visual.conv1.bias",
    "visual.attn_pool.",
)

# what their image towers always have
_ALWAYS_IN_CLIP = ("visual.class_embedding", "visual.ln_pre.weight", "visual.ln_post.weight")
_ALWAYS_IN_SIGLIP = ("visual.conv1.bias", "visual.ln_post.weight")


def lacked_by(layout: str, state: Mapping[str, object]) -> list[str]:
    """Return the keys of OpenAI's layout without which a layout's classes would begin a parameter anew."""
    if layout not in ("transformers", "big_vision"):
        return []
    wanted = [f"{k.removesuffix('weight')}bias" for k in state if k.endswith("attn.in_proj_weight")]
    if "visual.conv1.weight" in state:
        of_clip = any(k.startswith(OF_TRANSFORMERS_CLIP) or k == "text_projection" for k in state)
        wanted += _ALWAYS_IN_CLIP if of_clip and layout == "transformers" else _ALWAYS_IN_SIGLIP
    return [k for k in wanted if k not in state]


TIMM = KeyTable(
    names={
        "visual.class_embedding": "cls_token",
        "visual.reg_tokens": "reg_token",
        "visual.positional_embedding": "pos_embed",
        "visual.conv1.": "patch_embed.proj.",
        "visual.ln_pre.": "norm_pre.",
        "visual.ln_post.": "norm.",
        "visual.proj": "head.weight",
        "visual.attn_pool.probe": "attn_pool.latent",
        "visual.attn_pool.attn.out_proj.": "attn_pool.proj.",
        "visual.attn_pool.ln.": "attn_pool.norm.",
        "visual.attn_pool.mlp.c_fc.": "attn_pool.mlp.fc1.",
        "visual.attn_pool.mlp.c_proj.": "attn_pool.mlp.fc2.",
    },
    stacks={"visual.transformer.resblocks.": "blocks."},
    in_block={
        "ln_1.": "norm1.",
        "attn.out_proj.": "attn.proj.",
        "ls_1.": "ls1.",
        "ln_2.": "norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
        "ls_2.": "ls2.",
    },
    packed_in_block={"attn.in_proj_": (("attn.qkv.", 1),)},
    packed={"visual.attn_pool.attn.in_proj_": (("attn_pool.q.", 1), ("attn_pool.kv.", 2))},
    also={"fc_norm.": "visual.ln_post."},  # where the norm stands behind the pooling
    transposed=frozenset({"visual.proj"}),
    leading_ones={
        "visual.class_embedding": 2,
        "visual.reg_tokens": 1,
        "visual.positional_embedding": 1,
        "visual.attn_pool.probe": 2,
    },
)
