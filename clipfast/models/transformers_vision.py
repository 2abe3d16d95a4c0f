"""transformers' image towers of CLIP, MetaCLIP 2 and SigLIP, and SigLIP's pooling, accelerated.

Their outputs carry ``last_hidden_state``, and every token is computed. With ``token_outputs=False`` it is None, and
CLIP's last block computes the class token alone. Where one layer's hidden state is asked for, as LLaVA does, the layers
behind it wait until somebody reads what they give.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from clipfast.models.accelerated import Accelerated
from clipfast.models.fallbacks import count
from clipfast.models.transformers_blocks import GELUS, NORMS, SIGLIP, SIGLIP_2, transformer_of
from clipfast.models.transformers_calls import (
    Result,
    can_be_read,
    hidden_states_wanted,
    hides_nothing,
    output_of,
    refusal,
    with_hidden_states,
)
from clipfast.models.twin_blocks import TwinLayerNorm, TwinMLP, gelu_of, of_type, require
from clipfast.models.twin_pooling import TwinAttentionPool, TwinProbeAttention
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinViT
from clipfast.modules import plainness
from clipfast.modules.shortcuts import has_hooks


class _ImageTower(Accelerated):
    replaced_children = ("encoder", "post_layernorm")

    def make_twin(self) -> Twin:
        """Return the twin of blocks and the last LayerNorm."""
        require(hasattr(self, "post_layernorm"), "it is not laid out as in transformers 5")
        twin = TwinViT(
            transformer_of(self.encoder, False, self.config),
            TwinLayerNorm(self.post_layernorm, NORMS, "post_layernorm"),
        )
        return Twin(self, twin, self.replaced_children)

    def _twin_for(self, pixel_values: Any, kwargs: dict[str, Any]) -> Any:
        """Return the twin that serves a call, or None; why it cannot is counted."""
        twin = self.serving_twin()
        reason = None if twin is None or pixel_values is None else refusal(self, kwargs, causal=False)
        if reason is not None:
            count(self, reason)
        return None if pixel_values is None or reason is not None else twin


class VisionTower(_ImageTower):
    """``CLIPVisionModel`` and ``MetaClip2VisionModel``: read at the class token."""

    def forward(
        self, pixel_values: Tensor | None = None, interpolate_pos_encoding: bool | None = False, **kwargs: Any
    ) -> Result:
        """Return what transformers returns."""
        twin = self._twin_for(pixel_values, kwargs)
        if twin is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        x = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        wanted = hidden_states_wanted(self, kwargs, twin.transformer.layers)
        if wanted is not None:
            return with_hidden_states(
                self,
                twin,
                kwargs,
                x,
                wanted,
                finish=lambda tokens: tokens,
                pool=lambda tokens: twin.ln_post(tokens[:, 0]),
            )
        if self._clipfast_options["token_outputs"]:
            tokens = twin.tokens(x)
            return output_of(self, kwargs, tokens, twin.ln_post(tokens[:, 0]))
        return output_of(self, kwargs, None, twin(x))


class SiglipVisionTower(_ImageTower):
    """``SiglipVisionModel``: all tokens are read, by a pooling that is accelerated by itself."""

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool | None = False, **kwargs: Any) -> Result:
        """Return what transformers returns."""
        twin = self._twin_for(pixel_values, kwargs)
        if twin is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        x = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        pool = self.head if self.use_head else None
        wanted = hidden_states_wanted(self, kwargs, twin.transformer.layers)
        if wanted is not None:
            waits = pool is None or may_be_called_later(pool)
            return with_hidden_states(self, twin, kwargs, x, wanted, finish=twin.ln_post, pool=pool, waits=waits)
        tokens = twin.ln_post(twin.tokens(x))
        pooled = None if pool is None else pool(tokens)
        return output_of(self, kwargs, tokens if self._clipfast_options["token_outputs"] else None, pooled)


class PoolingHead(Accelerated):
    """SigLIP's pooling by attention: its query is computed once, keys and values for every token."""

    replaced_children = ("attention", "layernorm", "mlp")

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return what the probe is; see the base class."""
        probe = self._parameters.get("probe")
        return type(probe), None if probe is None else probe.shape

    def make_twin(self) -> Twin:
        """Return the twin of attention, LayerNorm and MLP."""
        probe = self._parameters.get("probe")
        require(type(probe) in (nn.Parameter, Tensor), f"its probe is a {type(probe).__qualname__}, no plain Parameter")
        require(tuple(probe.shape[:-1]) == (1, 1), f"its probe is {tuple(probe.shape)}, expected [1, 1, W]")
        attention = of_type(self.attention, nn.MultiheadAttention, "attention")
        require(attention.bias_k is None and not attention.add_zero_attn, "attention adds keys of its own")
        require(attention.batch_first and attention._qkv_same_embed_dim, "attention is laid out otherwise")
        require(attention.head_dim * attention.num_heads == attention.embed_dim, "attention has heads of another width")
        of_type(attention.out_proj, tuple(plainness.LINEARS), "attention's output")
        mlp = of_type(self.mlp, (SIGLIP.mlp, SIGLIP_2.mlp), "mlp")
        # a twin keeps no reference to what it stands for
        owner = weakref.ref(self)
        twin = TwinAttentionPool(
            lambda: owner().probe.flatten(),
            TwinProbeAttention([attention], attention.out_proj, attention.num_heads, name="attention"),
            TwinLayerNorm(self.layernorm, NORMS, "layernorm"),
            TwinMLP(mlp.fc1, mlp.fc2, gelu_of(mlp.activation_fn, GELUS, "mlp's activation"), "mlp"),
        )
        return Twin(self, twin, self.replaced_children)

    def packed_pool(self) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """Return what pools packed tokens ``[total, W]`` with offsets, or None where this head has to be called."""
        if has_hooks(self) or plainness.is_shadowed(self, "forward"):
            return None
        return self.serving_twin()


def may_be_called_later(head: nn.Module) -> bool:
    """Return whether nobody would notice when a head is called: its own code, and no more, is what it computes.

    Others may draw, count or write (peft merges its adapters into an attention's weights for the call).
    """
    return isinstance(head, PoolingHead) and head.packed_pool() is not None


class SiglipHead(PoolingHead):
    """``SiglipMultiheadAttentionPoolingHead``."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Return ``[B, W]`` from ``[B, N, W]``."""
        twin = self.serving_twin()
        return super().forward(hidden_state) if twin is None or hidden_state.dim() != 3 else twin(hidden_state)


class Siglip2Head(PoolingHead):
    """``Siglip2MultiheadAttentionPoolingHead``."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return ``[B, W]`` from ``[B, N, W]``."""
        twin = self.serving_twin()
        if twin is None or hidden_state.dim() != 3:
            return super().forward(hidden_state, attention_mask)
        if attention_mask is not None and not (
            can_be_read(attention_mask, hidden_state) and hides_nothing(attention_mask)
        ):
            count(self, "attention_mask hides tokens")
            return super().forward(hidden_state, attention_mask)
        return twin(hidden_state)
