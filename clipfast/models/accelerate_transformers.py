"""transformers' CLIP towers, accelerated: in ``CLIPModel``, ``CLIP…ModelWithProjection`` or alone.

Their outputs carry ``last_hidden_state``, which a caller may read at any time, so by default every token is computed.
With ``token_outputs=False`` it is None, and what only other tokens need is left out.

Served by transformers' own code: calls that ask for attention weights or hidden states, with ``position_ids``, a mask
that changes what is returned, or arguments that only an attention implementation knows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import activations
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip import modeling_clip

from clipfast.models.accelerated import Accelerated
from clipfast.models.twin_state import Twin
from clipfast.models.twins import (
    TwinAttention,
    TwinBlock,
    TwinLayerNorm,
    TwinText,
    TwinTransformer,
    TwinViT,
    base_of,
    gelu_of,
    linear_of,
    of_type,
    require,
)
from clipfast.modules import plainness

_GELUS = {
    activations.GELUActivation: "none",
    activations.NewGELUActivation: "tanh",
    activations.GELUTanh: "tanh",
    activations.QuickGELUActivation: "quick",
}
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_NORMS = (nn.LayerNorm,)
# those that read nothing but the pooled output of their towers
_READ_POOLED = (
    modeling_clip.CLIPModel,
    modeling_clip.CLIPVisionModelWithProjection,
    modeling_clip.CLIPTextModelWithProjection,
)


class VisionTower(Accelerated):
    """transformers' ``CLIPVisionModel``."""

    replaced_children = ("encoder", "post_layernorm")

    def make_twin(self) -> Twin:
        """Return the twin of blocks and pooling."""
        require(hasattr(self, "post_layernorm"), "it is not laid out as in transformers 5")
        twin = TwinViT(
            _transformer(self.encoder, False, self.config), TwinLayerNorm(self.post_layernorm, _NORMS, "post_layernorm")
        )
        return Twin(self, twin, self.replaced_children)

    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool | None = False, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Return what transformers returns."""
        twin = self.serving_twin()
        if twin is None or pixel_values is None or not _is_plain(self.config, kwargs, causal=False):
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        if self._clipfast_options["token_outputs"]:
            tokens = twin.tokens(x)
            return _output(self, kwargs, tokens, twin.ln_post(tokens[:, 0]))
        return _output(self, kwargs, None, twin(x))


class TextTower(Accelerated):
    """transformers' ``CLIPTextModel``."""

    replaced_children = ("embeddings", "encoder", "final_layer_norm")

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return whether positions are counted from 0; see the base class."""
        return _position_state(self.embeddings.position_ids)

    def make_twin(self) -> Twin:
        """Return the twin of embeddings, blocks and the last LayerNorm."""
        require(hasattr(self, "final_layer_norm"), "it is not laid out as in transformers 5")
        require(isinstance(self.eos_token_id, int), f"its eos_token_id is {self.eos_token_id}, expected one id")
        of_type(self.embeddings, modeling_clip.CLIPTextEmbeddings, "embeddings")
        ids = self.embeddings.position_ids
        require(
            ids.is_meta or torch.equal(ids[0], torch.arange(ids.shape[1], device=ids.device)),
            "embeddings: its position_ids do not count from 0",
        )
        positions = of_type(self.embeddings.position_embedding, nn.Embedding, "position_embedding")
        twin = TwinText(
            self.embeddings.token_embedding,
            lambda: positions.weight,
            _transformer(self.encoder, True, self.config),
            TwinLayerNorm(self.final_layer_norm, _NORMS, "final_layer_norm"),
            _read_id(self),
        )
        return Twin(self, twin, self.replaced_children)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        """Return what transformers returns."""
        twin = self.serving_twin()
        tokens_too = self._clipfast_options["token_outputs"]
        if (
            twin is None
            or position_ids is not None
            or not twin.takes(input_ids)
            or twin.eos_id != _read_id(self)
            or not _is_plain(self.config, kwargs, causal=True)
            or not _changes_nothing(attention_mask, None if tokens_too else twin.read_positions(input_ids), input_ids)
        ):
            return super().forward(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs
            )
        if not tokens_too:
            return _output(self, kwargs, None, twin(input_ids))
        tokens = twin.tokens(input_ids)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return _output(self, kwargs, tokens, tokens[rows, twin.read_positions(input_ids)])


KINDS: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (modeling_clip.CLIPVisionModel, VisionTower, ("forward",)),
    (modeling_clip.CLIPTextModel, TextTower, ("forward",)),
)


def left_alone(module: nn.Module) -> str | None:
    """Return why a tower is left as it is; None for what is no tower."""
    return None


def options_for(module: nn.Module, parent: nn.Module | None, *, token_outputs: bool = True) -> dict[str, Any]:
    """Return what an accelerated tower has to know beside itself: whether its tokens are wanted."""
    # other models read the tokens of their towers, whatever the caller of the whole reads
    read_by_parent = isinstance(parent, PreTrainedModel) and not isinstance(parent, _READ_POOLED)
    return {"token_outputs": token_outputs or read_by_parent}


def _transformer(source: nn.Module, causal: bool, config: Any) -> TwinTransformer:
    of_type(source, modeling_clip.CLIPEncoder, "encoder")
    of_type(source.layers, nn.ModuleList, "encoder.layers")
    blocks = [_block(layer, f"layer {i}", causal) for i, layer in enumerate(source.layers)]
    for i, layer in enumerate(source.layers):
        # the tower's is asked which attention implementation is wanted
        require(layer.self_attn.config is config, f"layer {i}'s attention has a configuration of its own")
    layers = source.layers
    return TwinTransformer(blocks, lambda: layers[0].gradient_checkpointing and layers[0].training)


def _block(source: nn.Module, name: str, causal: bool) -> TwinBlock:
    of_type(source, modeling_clip.CLIPEncoderLayer, name)
    of_type(source.mlp, modeling_clip.CLIPMLP, f"{name}'s MLP")
    attention = of_type(source.self_attn, modeling_clip.CLIPAttention, f"{name}'s attention")
    require(attention.scale == attention.head_dim**-0.5, f"{name} has a scale of its own")
    # the text model tells its layers that they are causal, the vision model asks them
    require(causal or not getattr(attention, "is_causal", False), f"{name} is causal (is_causal)")
    parts = [linear_of(getattr(attention, p), f"{name}'s {p}") for p in ("q_proj", "k_proj", "v_proj")]
    width = base_of(parts[0]).weight.shape[0]
    # what transformers reads is head_dim
    require(width % attention.head_dim == 0, f"{name} has heads of {attention.head_dim} for a width of {width}")
    return TwinBlock(
        TwinLayerNorm(source.layer_norm1, _NORMS, f"{name}'s layer_norm1"),
        TwinAttention(parts, attention.out_proj, width // attention.head_dim, causal, name=f"{name}'s attention"),
        TwinLayerNorm(source.layer_norm2, _NORMS, f"{name}'s layer_norm2"),
        source.mlp.fc1,
        source.mlp.fc2,
        gelu_of(source.mlp.activation_fn, _GELUS, f"{name}'s activation"),
        name,
    )


def _read_id(tower: nn.Module) -> int | None:
    """Return the id that the tower is read at; None: the largest, as configurations from before 2023 have it."""
    return None if tower.eos_token_id == 2 else tower.eos_token_id


def _is_plain(config: Any, kwargs: dict[str, Any], causal: bool) -> bool:
    """Return whether a call asks for no more than tokens and the pooled output."""
    return (
        not getattr(config, "output_hidden_states", False)
        and not getattr(config, "output_attentions", False)
        and getattr(config, "is_causal", None) in (None, causal)
        and config._attn_implementation in _ATTENTIONS
        and _is_known(config._attn_implementation)
        and all(value is None or value is False or name == "return_dict" for name, value in kwargs.items())
    )


def _position_state(ids: Tensor) -> tuple[Any, ...]:
    """Return what tells whether ids of positions are what they were: on the CPU their values."""
    if torch.compiler.is_compiling() or ids.is_meta:
        return ()
    if ids.device.type != "cpu":
        return id(ids), -1 if ids.is_inference() else ids._version
    return (torch.equal(ids[0], _count(ids.shape[1])),)


@lru_cache(maxsize=8)
def _count(tokens: int) -> Tensor:
    return torch.arange(tokens, device="cpu")


def _is_known(implementation: str | None) -> bool:
    """Return whether an attention implementation is transformers' own: users register others under its names."""
    function = modeling_clip.ALL_ATTENTION_FUNCTIONS.get(implementation)
    return function is None or plainness.is_from(function, "transformers")


def _changes_nothing(mask: Tensor | None, read: Tensor | None, tokens: Tensor) -> bool:
    """Return whether a mask hides nothing; with ``read``, nothing up to those positions ``[B]``."""
    if mask is None:
        return True
    # its values are read, as transformers reads them; they cannot be while compiling
    if torch.compiler.is_compiling() or not isinstance(mask, Tensor) or mask.shape != tokens.shape or mask.is_meta:
        return False
    shown = mask.bool()
    if read is not None:
        shown = shown | (torch.arange(mask.shape[1], device=mask.device) > read.to(mask.device)[:, None])
    return bool(shown.all())


def _output(
    tower: nn.Module, kwargs: dict[str, Any], tokens: Tensor | None, pooled: Tensor
) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
    output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)
    wants = kwargs.get("return_dict", getattr(tower.config, "return_dict", True))
    return output.to_tuple() if wants is False else output
