"""open_clip's towers, accelerated: ``CLIP``, ``CustomTextCLIP`` and whatever else holds its transformers.

Served by clipfast: ``VisionTransformer.forward`` with every pooling, and the text of ``CLIP.encode_text`` and
``TextTransformer.forward`` with every pooling, causal or not. Where one token is read (class token; the first or last
token of a text, its largest id or EOS) and tokens are not asked for, the last block computes that token alone; causal
text ends there. ``forward_intermediates`` is the library's own code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import hf_model, modified_resnet, timm_model
from open_clip import model as open_clip_model
from open_clip import transformer as open_clip_transformer
from open_clip.transformer import text_global_pool
from torch import Tensor, nn

from clipfast.models.accelerated import Accelerated
from clipfast.models.fallbacks import count
from clipfast.models.twin_blocks import (
    TwinBlock,
    TwinLayerNorm,
    attention_of_pytorch,
    gelu_of,
    of_type,
    require,
    scales_of,
)
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinText, TwinTransformer, TwinViT

_NORMS = (open_clip_transformer.LayerNorm, open_clip_transformer.LayerNormFp32, nn.LayerNorm)
_LEFT_ALONE = {
    modified_resnet.ModifiedResNet: "a ResNet's convolutions are PyTorch's either way",
    hf_model.HFTextEncoder: "its text model is not CLIP's",
    open_clip_transformer.MultimodalTransformer: "its blocks attend across modalities",
}
_TEXT = ("token_embedding", "transformer", "ln_final")
_GELUS = {open_clip_transformer.QuickGELU: "quick"}


class VisionTower(Accelerated):
    """open_clip's ``VisionTransformer``."""

    replaced_methods = ("forward", "_embeds", "_pool", "_global_pool")
    replaced_children = ("transformer", "ln_post")

    def make_twin(self) -> Twin:
        """Return the twin of blocks and pooling; see :class:`~clipfast.models.accelerated.Accelerated`."""
        transformer = _transformer(self.transformer, causal=False)
        if not self._reads_one():
            return Twin(self, TwinViT(transformer, nn.Identity()), ["transformer"])
        ln_post = TwinLayerNorm(self.ln_post, _NORMS, "ln_post")
        return Twin(self, TwinViT(transformer, ln_post), self.replaced_children)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return pooled features ``[B, E]``, and the tokens too with ``output_tokens``."""
        twin = self.serving_twin()
        if twin is None:
            return super().forward(x)
        x = self._embeds(x)
        if self._reads_one() and not self.output_tokens and isinstance(twin.ln_post, TwinLayerNorm):
            pooled, tokens = twin(x), None
        else:
            pooled, tokens = self._pool(twin.tokens(x))
        if self.proj is not None:
            pooled = pooled @ self.proj
        return (pooled, tokens) if self.output_tokens else pooled

    def _reads_one(self) -> bool:
        return self.attn_pool is None and self.pool_type == "tok"


class TextTower(Accelerated):
    """open_clip's ``TextTransformer``."""

    replaced_methods = ("forward", "_embeds")
    replaced_children = _TEXT

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return the mask, and what makes it another one; see the base class."""
        return self.cls_emb is None, self.use_pad_mask, *_mask_state(self.attn_mask)

    def make_twin(self) -> Twin:
        """Return the twin of embeddings, blocks and the last LayerNorm."""
        require(self.cls_emb is None, "it appends a class token with a mask of its own (cls_emb)")
        require(not self.use_pad_mask, "it masks padding (use_pad_mask)")
        return _text_twin(self, self.pool_type, self.eos_id)

    def forward(self, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return features ``[B, E]``, and the tokens too with ``output_tokens``."""
        twin = self.serving_twin()
        if twin is None or not _takes(self, twin, text):
            return super().forward(text)
        if self.output_tokens:
            tokens = twin.tokens(text)
            pooled = text_global_pool(tokens, text, self.pool_type, self.eos_id)
        else:
            pooled, tokens = _pooled(twin, text, self.pool_type, self.eos_id), None
        pooled = _project(pooled, self.text_projection)
        return (pooled, tokens) if self.output_tokens else pooled


class TextAtRoot(Accelerated):
    """open_clip's ``CLIP``, which holds the text tower's parts itself."""

    replaced_methods = ("encode_text",)
    replaced_children = _TEXT

    def baked_attributes(self) -> tuple[Any, ...]:
        """Return the mask; see the base class."""
        return _mask_state(self.attn_mask)

    def make_twin(self) -> Twin:
        """Return the twin of embeddings, blocks and the last LayerNorm of the text tower."""
        return _text_twin(self, self.text_pool_type, self.text_eos_id)

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Return features ``[B, E]``, of unit length with ``normalize``."""
        twin = self.serving_twin()
        if twin is None or not _takes(self, twin, text):
            return super().encode_text(text, normalize=normalize)
        features = _project(_pooled(twin, text, self.text_pool_type, self.text_eos_id), self.text_projection)
        return F.normalize(features, dim=-1) if normalize else features


# what is accelerated: the class, its accelerated form, and the methods that this file knows the insides of
KINDS: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (open_clip_transformer.VisionTransformer, VisionTower, VisionTower.replaced_methods),
    (open_clip_transformer.TextTransformer, TextTower, TextTower.replaced_methods),
    (open_clip_model.CLIP, TextAtRoot, TextAtRoot.replaced_methods),
)


def left_alone(module: nn.Module) -> str | None:
    """Return why a tower is left as it is; None for what is no tower, or is one whose parts are."""
    for kind, reason in _LEFT_ALONE.items():
        if isinstance(module, kind):
            return f"{kind.__name__}: {reason}"
    trunk = getattr(module, "trunk", None) if isinstance(module, timm_model.TimmModel) else None
    if trunk is None or _is_named_by_timm(trunk):
        return None
    if not any(c.__name__ == "VisionTransformer" for c in type(trunk).__mro__):
        return f"its trunk is timm's {type(trunk).__name__}, expected a VisionTransformer"
    return None


def _is_named_by_timm(trunk: nn.Module) -> bool:
    from clipfast.models import accelerate_timm  # needs timm, as whoever has a trunk does

    return accelerate_timm.left_alone(trunk) is not None


def options_for(module: nn.Module, parent: nn.Module | None, **wanted: Any) -> dict[str, Any]:
    """Return what an accelerated module has to know beside itself: nothing here."""
    return {}


def _transformer(source: nn.Module, causal: bool) -> TwinTransformer:
    of_type(source, open_clip_transformer.Transformer, "transformer")
    of_type(source.resblocks, nn.ModuleList, "transformer.resblocks")
    blocks = [_block(block, f"block {i}", causal) for i, block in enumerate(source.resblocks)]
    # each block's attention is known to take the batch first
    require(source.batch_first, "transformer takes the batch second (batch_first)")
    return TwinTransformer(blocks, lambda: source.grad_checkpointing)


def _block(source: nn.Module, name: str, causal: bool) -> TwinBlock:
    of_type(source, open_clip_transformer.ResidualAttentionBlock, name)
    require(not hasattr(source, "ln_1_kv"), f"{name} attends across modalities")
    of_type(source.mlp, nn.Sequential, f"{name}'s MLP")
    require(list(source.mlp._modules) == ["c_fc", "gelu", "c_proj"], f"{name}'s MLP has parts that are not known")
    return TwinBlock(
        TwinLayerNorm(source.ln_1, _NORMS, f"{name}'s ln_1"),
        attention_of_pytorch(source.attn, f"{name}'s attention", causal),
        TwinLayerNorm(source.ln_2, _NORMS, f"{name}'s ln_2"),
        source.mlp.c_fc,
        source.mlp.c_proj,
        gelu_of(source.mlp.gelu, _GELUS, f"{name}'s activation"),
        name,
        scales_of(source.ls_1, source.ls_2, open_clip_transformer.LayerScale, name),
    )


def _text_twin(owner: nn.Module, pool_type: str, eos_id: int | None) -> Twin:
    causal = owner.attn_mask is not None
    require(not causal or _is_causal(owner.attn_mask), "its attn_mask is not the causal one")
    weak = weakref.ref(owner)
    positions: Callable[[], Tensor] = lambda: weak().positional_embedding  # noqa: E731
    tower = TwinText(
        owner.token_embedding,
        positions,
        _transformer(owner.transformer, causal),
        TwinLayerNorm(owner.ln_final, _NORMS, "ln_final"),
        eos_id if pool_type == "eos" else None,
        pool_type if pool_type in ("first", "last") else None,
    )
    return Twin(owner, tower, _TEXT)


def _is_causal(mask: Tensor) -> bool:
    return mask.is_meta or torch.equal(mask, torch.full_like(mask, -torch.inf).triu(1))


def _mask_state(mask: Tensor | None) -> tuple[Any, ...]:
    """Return what tells whether a mask is what it was: on the CPU its values, elsewhere PyTorch's count of writes."""
    if mask is None or torch.compiler.is_compiling():
        return (mask is None,)
    if mask.device.type != "cpu" or mask.is_inference():
        return False, id(mask), -1 if mask.is_inference() else mask._version
    return False, mask.shape, mask.dtype, torch.equal(mask, _causal_mask(mask.shape[0], mask.dtype))


@lru_cache(maxsize=8)
def _causal_mask(tokens: int, dtype: torch.dtype) -> Tensor:
    return torch.full((tokens, tokens), -torch.inf, dtype=dtype, device="cpu").triu(1)


def _takes(tower: nn.Module, twin: TwinText, text: object) -> bool:
    takes = twin.takes(text)
    if not takes:
        count(tower, "text is no ids [B, L] of int64 or int32")
    return takes


def _pooled(twin: TwinText, text: Tensor, pool_type: str, eos_id: int | None) -> Tensor:
    if pool_type == twin.pooling and (pool_type != "eos" or eos_id == twin.eos_id):
        return twin(text)
    return text_global_pool(twin.tokens(text), text, pool_type, eos_id)


def _project(pooled: Tensor, projection: nn.Module | Tensor | None) -> Tensor:
    if projection is None:
        return pooled
    return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection
