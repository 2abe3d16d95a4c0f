"""transformers' CLIP towers, accelerated: in ``CLIPModel``, ``CLIP…ModelWithProjection`` or alone.

Their outputs carry ``last_hidden_state``. Without gradients a text tower computes its pooled output alone, and the
tokens when they are first read; otherwise every token is computed. With ``token_outputs=False`` it is None, and what
only other tokens need is left out.

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
from clipfast.models.fallbacks import count
from clipfast.models.later import Later, can_wait
from clipfast.models.lazy_output import lazy
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
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinText, TwinTransformer, TwinViT
from clipfast.modules import plainness
from clipfast.modules.shortcuts import shortcuts_enabled

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
        reason = None if twin is None or pixel_values is None else _not_plain(self.config, kwargs, causal=False)
        if reason is not None:
            count(self, reason)
        if twin is None or pixel_values is None or reason is not None:
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
        """Return what transformers returns; the tokens are computed when they are first read where that is exact."""
        twin = self.serving_twin()
        if twin is None:
            return self._original(input_ids, attention_mask, position_ids, **kwargs)
        reason = self._refusal(twin, input_ids, attention_mask, position_ids, kwargs)
        if reason is not None:
            count(self, reason)
            return self._original(input_ids, attention_mask, position_ids, **kwargs)
        options = self._clipfast_options
        read = twin.read_positions(input_ids)
        whole = _changes_nothing(attention_mask, None, input_ids)
        served = whole or _changes_nothing(attention_mask, read, input_ids)
        if not options["token_outputs"] and served:
            return _output(self, kwargs, None, twin(input_ids))
        if served and options["lazy"] and self._can_wait(twin, kwargs):
            return self._waiting(twin, input_ids, attention_mask, whole, kwargs)
        if not options["token_outputs"] or not whole:
            count(self, "attention_mask hides tokens" + (" of last_hidden_state" if served else " before the one read"))
            return self._original(input_ids, attention_mask, position_ids, **kwargs)
        tokens = twin.tokens(input_ids)
        rows = torch.arange(tokens.shape[0], device=tokens.device)
        return _output(self, kwargs, tokens, tokens[rows, read])

    def _refusal(
        self, twin: TwinText, input_ids: Any, attention_mask: Any, position_ids: Any, kwargs: dict[str, Any]
    ) -> str | None:
        """Return what a call asks for that the twin does not give, or None."""
        if position_ids is not None:
            return "position_ids"
        if not twin.takes(input_ids):
            return "input_ids are no ids [B, L] of int64 or int32"
        if twin.eos_id != _read_id(self):
            return "another eos_token_id"
        if attention_mask is not None and not _can_be_read(attention_mask, input_ids):
            return "an attention_mask that is not [B, L], or whose values cannot be read"
        return _not_plain(self.config, kwargs, causal=True)

    def _original(
        self, input_ids: Any, attention_mask: Any, position_ids: Any, **kwargs: Any
    ) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    def _can_wait(self, twin: TwinText, kwargs: dict[str, Any]) -> bool:
        """Return whether tokens may be computed later: the model will be the same, and the pooled output takes less."""
        return (
            not torch.compiler.is_compiling()
            and torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.maybe_current_level() is None
            and shortcuts_enabled()
            and twin.is_causal
            and _wants_dict(self, kwargs)
            and can_wait(self)
        )

    def _waiting(
        self, twin: TwinText, input_ids: Tensor, attention_mask: Tensor | None, whole: bool, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPooling:
        """Return an output whose tokens wait until they are read; who read those of the last call gets them at once."""
        options = self._clipfast_options
        ids, mask = input_ids.clone(), None if whole else attention_mask.clone()

        def tokens() -> Tensor:
            if mask is None:
                return twin.tokens(ids)
            # what those behind the mask are is left to transformers' code
            count(self, "last_hidden_state was read behind an attention_mask")
            return self._original(ids, mask, None, **kwargs | {"return_dict": True}).last_hidden_state

        if options.get("tokens_are_read"):
            # all at once costs less than twice
            found = tokens()
            pooled = found[torch.arange(found.shape[0], device=found.device), twin.read_positions(ids)]
            later = lambda: found  # noqa: E731
        else:
            pooled = twin(input_ids)
            later = Later(self, twin, tokens)
        options["tokens_are_read"] = False

        def first_read() -> Tensor:
            result = later()
            options["tokens_are_read"] = True
            return result

        return lazy(BaseModelOutputWithPooling(pooler_output=pooled), first_read)


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
    # this one puts its tower's tokens into its own output
    read_at_once = read_by_parent or isinstance(parent, modeling_clip.CLIPTextModelWithProjection)
    return {"token_outputs": token_outputs or read_by_parent, "lazy": token_outputs and not read_at_once}


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


def _not_plain(config: Any, kwargs: dict[str, Any], causal: bool) -> str | None:
    """Return what a call asks for beside tokens and the pooled output, or None."""
    for name in ("output_hidden_states", "output_attentions"):
        if getattr(config, name, False):
            return f"{name} in the configuration"
    if getattr(config, "is_causal", None) not in (None, causal):
        return "is_causal in the configuration"
    if config._attn_implementation not in _ATTENTIONS:
        return f"the attention implementation {config._attn_implementation}"
    if not _is_known(config._attn_implementation):
        return f"a patched attention implementation {config._attn_implementation}"
    for name, value in kwargs.items():
        if not (value is None or value is False or name == "return_dict"):
            return name
    return None


def _can_be_read(mask: Any, tokens: Tensor) -> bool:
    """Return whether a mask has a value for every token, and it can be read now, as transformers reads it."""
    return (
        not torch.compiler.is_compiling()
        and isinstance(mask, Tensor)
        and mask.shape == tokens.shape
        and not mask.is_meta
        and not (mask.is_cuda and torch.cuda.is_current_stream_capturing())
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
    shown = mask.bool()
    if read is not None:
        shown = shown | (torch.arange(mask.shape[1], device=mask.device) > read.to(mask.device)[:, None])
    return bool(shown.all())


def _wants_dict(tower: nn.Module, kwargs: dict[str, Any]) -> bool:
    return kwargs.get("return_dict", getattr(tower.config, "return_dict", True)) is not False


def _output(
    tower: nn.Module, kwargs: dict[str, Any], tokens: Tensor | None, pooled: Tensor
) -> BaseModelOutputWithPooling | tuple[Tensor, ...]:
    output = BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)
    return output if _wants_dict(tower, kwargs) else output.to_tuple()
