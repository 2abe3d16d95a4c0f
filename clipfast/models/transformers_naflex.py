"""transformers' image tower of SigLIP 2, accelerated: pictures of any aspect, packed where transformers pads them.

The blocks compute the patches that there are, and the pooled output of those. ``last_hidden_state`` and hidden states
come padded as transformers gives them, with what it computes there: a patch of padding is a query to its picture's
patches that none of these sees. A picture's patches of padding are alike, so that one stands for all; where they are
not, transformers' own code serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.siglip2 import modeling_siglip2

from clipfast import ops
from clipfast.models.accelerated import Accelerated
from clipfast.models.fallbacks import count
from clipfast.models.later import Later, can_wait
from clipfast.models.lazy_output import lazy
from clipfast.models.transformers_blocks import NORMS, transformer_of
from clipfast.models.transformers_calls import (
    Result,
    hidden_states_wanted,
    output_of,
    refusal,
    wants_dict,
    with_hidden_states,
)
from clipfast.models.transformers_vision import PoolingHead
from clipfast.models.twin_blocks import TwinAttention, TwinLayerNorm, linear_of, of_type, require
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinTransformer
from clipfast.modules.naflex import NaFlexBatch
from clipfast.modules.packed_images import Arrangement, arrange
from clipfast.modules.positions import positions_for, resampled_positions
from clipfast.modules.shortcuts import shortcuts_enabled
from clipfast.ops import transfer


class TwinPaddedAttention(TwinAttention):
    """Attention of packed sequences, and of one more query to each of them, which none of theirs sees.

    Rows behind the packed ones are such queries, one a sequence.
    """

    def _attend(self, qkv: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        total = int(cu_seqlens[-1])
        if qkv.shape[0] == total:
            return super()._attend(qkv, cu_seqlens)
        seen, more = qkv.tensor_split([total])
        _, key, value = seen.chunk(3, dim=-1)
        asked = ops.single_query_attention(more.chunk(3, dim=-1)[0], key, value, self.heads, cu_seqlens=cu_seqlens)
        return torch.cat([super()._attend(seen, cu_seqlens), asked])


class _WithPadding(TwinTransformer):
    """The same blocks, called for what packed weights do not give: queries of padding."""

    def packed_encoder(self, x: Tensor) -> None:
        """Return None."""


class TwinNaFlex(nn.Module):
    """What :class:`NaFlexTower` computes with.

    Args:
        patch_embedding: Makes tokens of patches.
        table: The embedding of positions, a grid of them row by row.
        grid: Its rows and columns.
        transformer: The blocks, with :class:`TwinPaddedAttention`.
        ln_post: The last LayerNorm.
    """

    def __init__(
        self,
        patch_embedding: nn.Module,
        table: nn.Module,
        grid: tuple[int, int],
        transformer: TwinTransformer,
        ln_post: TwinLayerNorm,
    ) -> None:
        super().__init__()
        self.patch_embedding, self.table, self.grid = patch_embedding, table, grid
        self.transformer, self.ln_post = transformer, ln_post
        self.with_padding = _WithPadding(transformer.resblocks, lambda: transformer.grad_checkpointing)

    def embedded(self, batch: NaFlexBatch, arranged: Arrangement, padding: Tensor | None) -> Tensor:
        """Return tokens ``[total, W]``, and behind them one ``[B, W]`` for each picture's padding if it is given."""
        patches = batch.patches if arranged.rows is None else batch.patches.index_select(0, arranged.rows)
        positions = self._positions(batch, arranged, patches)
        if padding is not None:
            first = transfer.to_device(arranged.cu_seqlens[:-1], patches.device)
            patches = torch.cat([patches, padding])
            # transformers gives padding the position of the first patch
            positions = torch.cat([positions, positions.index_select(0, first)])
        return self.patch_embedding(patches) + positions

    def _positions(self, batch: NaFlexBatch, arranged: Arrangement, x: Tensor) -> Tensor:
        table = self.table.weight
        if table.dtype == torch.float64 and torch.is_grad_enabled() and table.requires_grad:
            # who compares digits: transformers rounds each picture's gradient to float32
            grids = [(rows, columns) for rows, columns in batch.grids.tolist()]
            rows = torch.cat(resampled_positions(table.unflatten(0, self.grid), grids))
            return rows if arranged.rows is None else rows.index_select(0, arranged.rows)
        found = positions_for(self.table, table, self.grid, arranged.grids, x)
        rows = torch.cat(found) if len(found) > 1 else found[0]
        if rows.requires_grad:
            # gradients of many pictures add up in no fewer bits than 32
            rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return F.embedding(arranged.positions, rows).to(table.dtype)


class NaFlexTower(Accelerated):
    """``Siglip2VisionModel``."""

    replaced_children = ("embeddings", "encoder", "post_layernorm")

    def make_twin(self) -> Twin:
        """Return the twin of embeddings, blocks and the last LayerNorm."""
        require(hasattr(self, "post_layernorm"), "it is not laid out as in transformers 5")
        embeddings = of_type(self.embeddings, modeling_siglip2.Siglip2VisionEmbeddings, "embeddings")
        table = of_type(embeddings.position_embedding, nn.Embedding, "position_embedding")
        side = embeddings.position_embedding_size
        require(table.max_norm is None, "position_embedding changes its weight when it is read (max_norm)")
        require(side * side == table.num_embeddings, f"position_embedding has {table.num_embeddings} rows, no square")
        require(self.config.num_channels == 3, f"its pictures have {self.config.num_channels} channels, expected 3")
        twin = TwinNaFlex(
            linear_of(embeddings.patch_embedding, "patch_embedding"),
            table,
            (side, side),
            transformer_of(self.encoder, False, self.config, TwinPaddedAttention),
            TwinLayerNorm(self.post_layernorm, NORMS, "post_layernorm"),
        )
        return Twin(self, twin, self.replaced_children)

    def forward(
        self, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor, **kwargs: Any
    ) -> Result:
        """Return what transformers returns."""
        twin = self.serving_twin()
        if twin is None:
            return super().forward(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        reason, lengths = refusal(self, kwargs, causal=False), None
        if reason is None:
            features = twin.patch_embedding.in_features
            reason, lengths = _lengths(pixel_values, pixel_attention_mask, spatial_shapes, features)
        wanted = None if reason else hidden_states_wanted(self, kwargs, twin.transformer.layers)
        pool = self._packed_pool()
        # tokens go out padded where they are wanted, and to a head that somebody watches
        shown = self._clipfast_options["token_outputs"] or wanted is not None or (pool is None and self.use_head)
        if reason is None and shown and not _is_uniform(pixel_values, lengths):
            reason = "pixel_values whose padding is not alike"
        if reason is None and shown and _derives_padding(pixel_values, lengths):
            reason = "gradients of pixel_values, each of whose patches of padding has its own"
        if reason is not None:
            count(self, reason)
            return super().forward(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        call = _Call(self, twin, pixel_values, pixel_attention_mask, spatial_shapes, lengths, shown)
        if wanted is not None:
            return call.with_hidden_states(wanted, kwargs, pool)
        if shown and call.padding is not None and pool is not None and self._waits(twin, pixel_values, kwargs):
            return call.waiting(pool)
        x = call.tokens() if shown else call.tokens_seen()
        tokens = call.padded(x) if shown else None
        pooled = call.pooled(x, pool)
        return output_of(self, kwargs, tokens if self._clipfast_options["token_outputs"] else None, pooled)

    def _packed_pool(self) -> Callable[[Tensor, Tensor | None], Tensor] | None:
        """Return what pools packed tokens, or None where there is no head, or it has to be called by itself."""
        head = self.head if self.use_head else None
        return head.packed_pool() if isinstance(head, PoolingHead) else None

    def _waits(self, twin: TwinNaFlex, pixel_values: Tensor, kwargs: dict[str, Any]) -> bool:
        """Return whether tokens wait until they are read: packed weights give the pooled output without padding."""
        like = twin.table.weight
        return (
            self._clipfast_options["lazy"]
            and wants_dict(self, kwargs)
            and can_wait(self)
            and twin.transformer.packed_encoder(like.detach()) is not None
        )


class _Call:
    """One call of a tower: its pictures, packed.

    Args:
        tower: The accelerated tower.
        twin: Its twin.
        pixel_values, mask, shapes: The call's.
        lengths: ``[B]`` in host memory: how many patches each picture has.
        shown: Whether tokens are wanted with their padding.
    """

    def __init__(
        self, tower: NaFlexTower, twin: TwinNaFlex, pixel_values: Tensor, mask: Tensor | None, shapes: Tensor,
        lengths: Tensor, shown: bool,
    ) -> None:  # fmt: skip
        self.tower, self.twin, self.mask = tower, twin, mask
        pixel_values = pixel_values.to(twin.patch_embedding.weight.dtype)
        device, self._most = pixel_values.device, pixel_values.shape[1]
        is_padded = bool((lengths < self._most).any())
        there = (torch.arange(self._most, device="cpu") < lengths[:, None]).flatten().nonzero()[:, 0]
        patches = pixel_values.flatten(0, 1)
        if is_padded:
            patches = patches.index_select(0, transfer.to_device(there, device))
        batch = NaFlexBatch(patches, shapes.cpu())
        self.arranged = arrange(batch, device)
        self.total, self.cu_seqlens = batch.total, self.arranged.cu_seqlens
        self.padding = None
        if shown and is_padded:
            # in the order in which the pictures are packed
            self.padding = pixel_values[:, -1].index_select(0, self.arranged.order.argsort())
        if shown:
            first = transfer.to_device(self.cu_seqlens, device)[self.arranged.order]
            places = torch.arange(self._most, device=device)
            is_there = places < transfer.to_device(lengths, device)[:, None]
            self._places = torch.where(is_there, first[:, None] + places, (self.total + self.arranged.order)[:, None])
        self.x = twin.embedded(batch, self.arranged, self.padding)

    def tokens(self) -> Tensor:
        """Return the tokens after the last LayerNorm, ``[total, W]``, with those of padding behind them."""
        return self.twin.ln_post(self._transformer(self.x, self.cu_seqlens))

    def tokens_seen(self) -> Tensor:
        """Return the tokens after the last LayerNorm without those of padding, ``[total, W]``."""
        return self.twin.ln_post(self.twin.transformer(self.x[: self.total], self.cu_seqlens))

    def padded(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]`` as transformers lays tokens out."""
        return F.embedding(self._places, x)

    def pooled(self, x: Tensor, pool: Callable[[Tensor, Tensor | None], Tensor] | None) -> Tensor | None:
        """Return the pooled output ``[B, W]`` of tokens after the last LayerNorm; None where the tower has no head."""
        if pool is not None:
            return pool(x[: self.total], self.cu_seqlens).index_select(0, self.arranged.order)
        return self.tower.head(self.padded(x), self.mask) if self.tower.use_head else None

    def waiting(self, pool: Callable[[Tensor, Tensor | None], Tensor]) -> BaseModelOutputWithPooling:
        """Return an output whose tokens wait until they are read; who read those of the last call gets them at once."""
        options = self.tower._clipfast_options
        if options.get("tokens_are_read"):
            # all at once costs less than twice
            x = self.tokens()
            pooled, later = self.pooled(x, pool), lambda: self.padded(x)
        else:
            pooled = self.pooled(self.tokens_seen(), pool)
            later = Later(self.tower, self.twin, just_used=True).of(
                "last_hidden_state", lambda: self.padded(self.tokens())
            )
        options["tokens_are_read"] = False

        def first_read() -> Tensor:
            result = later()
            options["tokens_are_read"] = True
            return result

        return lazy(BaseModelOutputWithPooling(pooler_output=pooled), {"last_hidden_state": first_read})

    def with_hidden_states(
        self, wanted: list[int], kwargs: dict[str, Any], pool: Callable[[Tensor, Tensor | None], Tensor] | None
    ) -> Result:
        """Return the output of a call that asks for hidden states."""
        has_head = self.tower.use_head
        return with_hidden_states(
            self.tower,
            self.twin,
            kwargs,
            self.x,
            wanted,
            finish=self.twin.ln_post,
            pool=(lambda x: self.pooled(x, pool)) if has_head else None,
            waits=not has_head or pool is not None,
            cu_seqlens=self.cu_seqlens,
            show=self.padded,
            transformer=self._transformer,
        )

    @property
    def _transformer(self) -> TwinTransformer:
        return self.twin.transformer if self.padding is None else self.twin.with_padding


def _lengths(pixel_values: Any, mask: Any, shapes: Any, features: int) -> tuple[str | None, Tensor | None]:
    """Return why pictures cannot be packed, or None; and how many patches each has, ``[B]`` in host memory.

    Args:
        pixel_values, mask, shapes: The call's.
        features: How many values a patch has to have.
    """
    if torch.compiler.is_compiling():
        return "how many patches there are is data, which a compiler does not know", None
    if not shortcuts_enabled():
        return "exact shortcuts are forbidden", None
    if not isinstance(pixel_values, Tensor) or pixel_values.dim() != 3 or pixel_values.shape[2] != features:
        return f"pixel_values are no [B, N, {features}]", None
    has_values = isinstance(shapes, Tensor) and not (shapes.is_floating_point() or shapes.is_meta)
    if not has_values or not len(shapes) or shapes.shape != (pixel_values.shape[0], 2):
        return "spatial_shapes are no integers [B, 2]", None
    sizes, most = shapes.cpu().long(), pixel_values.shape[1]
    lengths = sizes.prod(dim=1)
    if int(sizes.min()) < 1 or int(lengths.max()) > most:
        return "spatial_shapes that are no grids of at most N patches", None
    if mask is None:
        shown = (lengths == most).all()
    elif not isinstance(mask, Tensor) or mask.shape != pixel_values.shape[:2] or mask.is_meta:
        return "a pixel_attention_mask that is not [B, N]", None
    else:
        shown = torch.equal(mask.bool().cpu(), torch.arange(most, device="cpu") < lengths[:, None])
    return (None if shown else "a pixel_attention_mask other than that of spatial_shapes"), lengths


def _derives_padding(pixel_values: Tensor, lengths: Tensor) -> bool:
    """Return whether somebody derives by patches of padding, of which one stands for all."""
    derives = torch.is_grad_enabled() and pixel_values.requires_grad
    return derives and bool((lengths < pixel_values.shape[1]).any())


def _is_uniform(pixel_values: Tensor, lengths: Tensor) -> bool:
    """Return whether the patches of padding of each picture are alike."""
    hidden = torch.arange(pixel_values.shape[1], device="cpu") >= lengths[:, None]
    picture, place = (transfer.to_device(t, pixel_values.device) for t in hidden.nonzero(as_tuple=True))
    return torch.equal(pixel_values[picture, place], pixel_values[picture, -1])
