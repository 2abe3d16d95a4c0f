"""The blocks of transformers' CLIP-like towers as twins: one form in four families, under other names in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from transformers import activations
from transformers.models.clip import modeling_clip
from transformers.models.metaclip_2 import modeling_metaclip_2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

from clipfast.models.twin_blocks import (
    TwinAttention,
    TwinBlock,
    TwinLayerNorm,
    base_of,
    gelu_of,
    linear_of,
    of_type,
    require,
)
from clipfast.models.twins import TwinTransformer

GELUS = {
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
    activations.QuickGELUActivation: "quick",
}
NORMS = (nn.LayerNorm,)


@dataclass(frozen=True)
class Family:
    """The classes that a family's towers are made of; each is what its code says, and a subclass may not be.

    Attributes:
        encoder, layer, attention, mlp, text_embeddings: The classes.
        is_clip: Whether its text is causal and read at the EOS, or in both directions and read at its last token.
        largest_id_for: The EOS id of configurations from before 2023, whose texts are read at their largest id.
    """

    encoder: type
    layer: type
    attention: type
    mlp: type
    text_embeddings: type
    is_clip: bool = True
    largest_id_for: int | None = None


def _family(modeling: ModuleType, prefix: str, **options: Any) -> Family:
    names = ("Encoder", "EncoderLayer", "Attention", "MLP", "TextEmbeddings")
    return Family(*(getattr(modeling, prefix + name) for name in names), **options)


CLIP = _family(modeling_clip, "CLIP", largest_id_for=2)
METACLIP_2 = _family(modeling_metaclip_2, "MetaClip2")
SIGLIP = _family(modeling_siglip, "Siglip", is_clip=False)
SIGLIP_2 = _family(modeling_siglip2, "Siglip2", is_clip=False)
_FAMILIES = (CLIP, METACLIP_2, SIGLIP, SIGLIP_2)


def family_of(encoder: nn.Module) -> Family:
    """Return the family of a tower's encoder.

    Raises:
        Refusal: It is of none.
    """
    of_type(encoder, tuple(family.encoder for family in _FAMILIES), "encoder")
    return next(family for family in _FAMILIES if family.encoder is type(encoder))


def transformer_of(
    source: nn.Module, causal: bool, config: Any, attention: Callable[..., TwinAttention] = TwinAttention
) -> TwinTransformer:
    """Return the twin of an encoder.

    Args:
        source: The encoder.
        causal: Whether a token attends to itself and those before it only.
        config: The tower's, which says what attention is wanted.
        attention: Makes the twin of an attention.

    Raises:
        Refusal: There is none.
    """
    family = family_of(source)
    layers = of_type(source.layers, nn.ModuleList, "encoder.layers")
    blocks = [_block(layer, f"layer {i}", causal, family, attention) for i, layer in enumerate(layers)]
    for i, layer in enumerate(layers):
        # the tower's is asked which attention implementation is wanted
        require(layer.self_attn.config is config, f"layer {i}'s attention has a configuration of its own")
    return TwinTransformer(blocks, lambda: layers[0].gradient_checkpointing and layers[0].training)


def _block(source: nn.Module, name: str, causal: bool, family: Family, make: Callable[..., TwinAttention]) -> TwinBlock:
    of_type(source, family.layer, name)
    of_type(source.mlp, family.mlp, f"{name}'s MLP")
    attention = of_type(source.self_attn, family.attention, f"{name}'s attention")
    require(attention.scale == attention.head_dim**-0.5, f"{name} has a scale of its own")
    # the text model tells CLIP's layers that they are causal, the vision model asks them
    require((causal and family.is_clip) or not getattr(attention, "is_causal", False), f"{name} is causal (is_causal)")
    parts = [linear_of(getattr(attention, p), f"{name}'s {p}") for p in ("q_proj", "k_proj", "v_proj")]
    width = base_of(parts[0]).weight.shape[0]
    # what transformers reads is head_dim
    require(width % attention.head_dim == 0, f"{name} has heads of {attention.head_dim} for a width of {width}")
    return TwinBlock(
        TwinLayerNorm(source.layer_norm1, NORMS, f"{name}'s layer_norm1"),
        make(parts, attention.out_proj, width // attention.head_dim, causal, name=f"{name}'s attention"),
        TwinLayerNorm(source.layer_norm2, NORMS, f"{name}'s layer_norm2"),
        source.mlp.fc1,
        source.mlp.fc2,
        gelu_of(source.mlp.activation_fn, GELUS, f"{name}'s activation"),
        name,
    )
