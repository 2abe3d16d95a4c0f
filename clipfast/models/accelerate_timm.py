"""timm's ``VisionTransformer``, accelerated: CLIP's, SigLIP's and the many others of its layout.

Served by clipfast: ``forward`` and ``forward_features``. Where the class token is read, ``forward`` computes the last
block for it alone. Pooling by attention (SigLIP's) is a module that is accelerated by itself, wherever it stands.
Patch, class, register and position embeddings, patch dropout, other poolings and the head are timm's code;
``forward_intermediates`` and calls with an attention mask too.
"""

from __future__ import annotations

import weakref
from typing import Any

from timm import layers as timm_layers
from timm.layers import activations, norm
from timm.models import vision_transformer
from torch import Tensor, nn

from clipfast.models.accelerated import Accelerated
from clipfast.models.fallbacks import count
from clipfast.models.twin_blocks import (
    TwinAttention,
    TwinBlock,
    TwinLayerNorm,
    TwinMLP,
    base_of,
    gelu_of,
    linear_of,
    of_type,
    require,
    scales_of,
)
from clipfast.models.twin_pooling import TwinAttentionPool, TwinProbeAttention
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinTransformer, TwinViT

_NORMS = (norm.LayerNorm, norm.LayerNormFp32, nn.LayerNorm)
_GELUS = {activations.GELU: "none", activations.GELUTanh: "tanh", activations.QuickGELU: "quick"}
_LEFT_ALONE = {
    "Eva": "its blocks are of another kind (rotary positions, gated MLPs)",
    "NaFlexVit": "its pictures of many sizes are padded and masked, where clipfast's own ViT packs them",
}


class VisionTower(Accelerated):
    """timm's ``VisionTransformer``."""

    replaced_methods = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")
    replaced_children = ("blocks", "norm")

    def make_twin(self) -> Twin:
        """Return the twin of blocks and the last LayerNorm."""
        of_type(self.blocks, nn.Sequential, "blocks")
        weak = weakref.ref(self)
        blocks = [_block(block, f"block {i}") for i, block in enumerate(self.blocks)]
        ln_post = nn.Identity() if type(self.norm) is nn.Identity else TwinLayerNorm(self.norm, _NORMS, "norm")
        tower = TwinViT(TwinTransformer(blocks, lambda: weak().grad_checkpointing), ln_post)
        return Twin(self, tower, self.replaced_children)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return all tokens, ``[B, N, W]``."""
        twin = self.serving_twin()
        if twin is None or _asks_for_a_mask(self, attn_mask, is_causal):
            return super().forward_features(x, **_masks(attn_mask, is_causal))
        return twin.ln_post(twin.tokens(self._clipfast_embed(x)))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return what the head gives, ``[B, classes]``."""
        twin = self.serving_twin() if self.global_pool == "token" and self.attn_pool is None else None
        if twin is None or attn_mask is not None or is_causal:
            # what serves it in the end counts
            return super().forward(x, **_masks(attn_mask, is_causal))
        pooled = twin(self._clipfast_embed(x))
        return self.head(self.head_drop(self.fc_norm(pooled)))

    def _clipfast_embed(self, x: Tensor) -> Tensor:
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))


class AttentionPool(Accelerated):
    """timm's ``AttentionPoolLatent`` of one latent, as SigLIP's towers have it."""

    replaced_children = ("q", "kv", "q_norm", "k_norm", "proj", "proj_drop", "norm", "mlp")

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return what its own code reads of itself, the latent's values apart; see the base class."""
        latent, positions = self.latent, self.pos_embed
        return (
            (type(latent), latent.shape, positions is None),
            (self.latent_len, self.num_heads, self.head_dim, self.scale, self.pool),
        )

    def make_twin(self) -> Twin:
        """Return the twin of the whole pooling."""
        (kind, shape, _), (latents, heads, head_dim, scale, pool) = self.baked_attributes()
        require(kind in (nn.Parameter, Tensor), f"its latent is a {kind.__name__}, no plain Parameter")
        require(latents == 1, f"it has {latents} latents, expected one")
        require(self.pos_embed is None, "it adds positions to its tokens (pos_embed)")
        require(pool in ("token", "avg"), f"it pools its latent by {pool!r}, expected 'token' or 'avg'")
        require(scale == head_dim**-0.5, "it has a scale of its own")
        for part in ("q_norm", "k_norm"):
            of_type(getattr(self, part), nn.Identity, f"its {part}")
        of_type(self.proj_drop, nn.Dropout, "its proj_drop")
        q, kv = linear_of(self.q, "its q"), linear_of(self.kv, "its kv")
        width = heads * head_dim
        require(
            tuple(shape) == (1, 1, width)
            and tuple(base_of(q).weight.shape) == (width, width)
            and tuple(base_of(kv).weight.shape) == (2 * width, width),
            f"its latent {tuple(shape)}, q and kv are not of {heads} heads of {head_dim}",
        )
        linear_of(self.proj, "its proj")
        weak = weakref.ref(self)
        tower = TwinAttentionPool(
            lambda: weak().latent[0, 0],
            TwinProbeAttention([q, kv], self.proj, heads, name="it"),
            TwinLayerNorm(self.norm, _NORMS, "its norm"),
            TwinMLP(*_mlp(self.mlp, "its"), "its MLP"),
        )
        return Twin(self, tower, self.replaced_children)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Return ``[B, W]`` from tokens ``[B, N, W]``."""
        twin = self.serving_twin()
        if twin is None or _asks_for_a_mask(self, attn_mask, False) or not _are_tokens(x):
            return super().forward(x, **_masks(attn_mask, False))
        return twin(x)


KINDS: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (vision_transformer.VisionTransformer, VisionTower, VisionTower.replaced_methods),
    (timm_layers.AttentionPoolLatent, AttentionPool, AttentionPool.replaced_methods),
)


def left_alone(module: nn.Module) -> str | None:
    """Return why a tower is left as it is; None for what is no tower."""
    found = (cls.__name__ for cls in type(module).__mro__ if cls.__name__ in _LEFT_ALONE)
    return next((f"{name}: {_LEFT_ALONE[name]}" for name in found), None)


def options_for(module: nn.Module, parent: nn.Module | None, **wanted: Any) -> dict[str, Any]:
    """Return what an accelerated tower has to know beside itself: nothing here."""
    return {}


def _asks_for_a_mask(tower: nn.Module, attn_mask: Tensor | None, is_causal: bool) -> bool:
    if attn_mask is not None or is_causal:
        count(tower, "attn_mask" if attn_mask is not None else "is_causal")
    return attn_mask is not None or is_causal


def _masks(attn_mask: Tensor | None, is_causal: bool) -> dict[str, Any]:
    """Return the arguments that were given: older versions have none of them."""
    given = {} if attn_mask is None else {"attn_mask": attn_mask}
    return given if is_causal is False else given | {"is_causal": is_causal}


def _are_tokens(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 3 and x.numel() > 0


def _block(source: nn.Module, name: str) -> TwinBlock:
    of_type(source, vision_transformer.Block, name)
    for part in ("drop_path1", "drop_path2"):
        of_type(getattr(source, part), (nn.Identity, timm_layers.DropPath), f"{name}'s {part}")
    attention = of_type(source.attn, timm_layers.Attention, f"{name}'s attention")
    for part in ("q_norm", "k_norm", "norm"):
        of_type(getattr(attention, part, nn.Identity()), nn.Identity, f"{name}'s {part} in its attention")
    require(getattr(attention, "gate", None) is None, f"{name}'s attention has a gate")
    require(attention.scale == attention.head_dim**-0.5, f"{name} has a scale of its own")
    linear_of(attention.qkv, f"{name}'s qkv")
    width = 3 * attention.num_heads * attention.head_dim
    require(
        width == base_of(attention.qkv).weight.shape[0],
        f"{name} has {attention.num_heads} heads of {attention.head_dim}, which are not its width",
    )
    for part in (attention.attn_drop, attention.proj_drop):
        of_type(part, nn.Dropout, f"{name}'s dropout")
    return TwinBlock(
        TwinLayerNorm(source.norm1, _NORMS, f"{name}'s norm1"),
        TwinAttention([attention.qkv], attention.proj, attention.num_heads, name=f"{name}'s attention"),
        TwinLayerNorm(source.norm2, _NORMS, f"{name}'s norm2"),
        *_mlp(source.mlp, f"{name}'s"),
        name,
        scales_of(source.ls1, source.ls2, timm_layers.LayerScale, name),
    )


def _mlp(source: nn.Module, whose: str) -> tuple[nn.Module, nn.Module, str]:
    """Return both layers of an MLP, and the GELU between them."""
    of_type(source, timm_layers.Mlp, f"{whose} MLP")
    of_type(source.norm, nn.Identity, f"{whose} LayerNorm in its MLP")
    for part in (source.drop1, source.drop2):
        of_type(part, nn.Dropout, f"{whose} dropout")
    return source.fc1, source.fc2, gelu_of(source.act, _GELUS, f"{whose} activation")
