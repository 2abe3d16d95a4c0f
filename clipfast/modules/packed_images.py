"""What a ViT computes of pictures of any aspect: all of them packed, or grid by grid where somebody would notice.

Blocks take packed rows with offsets. Pictures are ordered by their lengths for them, so that attention takes those of
one length as one batch without moving them. What comes out is in the order in which the pictures came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.modules import plainness
from clipfast.modules.naflex import NaFlexBatch, uncut
from clipfast.modules.norm import LayerNorm
from clipfast.modules.patches import PatchDropout
from clipfast.modules.plainness import is_untouched
from clipfast.modules.pooling import AttentionPool, ProbeAttention, pooled
from clipfast.modules.positions import Grid, positions_for
from clipfast.modules.shortcuts import is_observed
from clipfast.modules.uncompiled import uncompiled
from clipfast.ops import attention_packed, transfer
from clipfast.ops.attention_packed import inverse, offsets_of

_FORWARDS = {kind: kind.forward for kind in (LayerNorm, AttentionPool, ProbeAttention, PatchDropout)}
_NOT_COMPILED = "how many patches a NaFlexBatch has is data: its blocks are compiled, what lies around them is not"


@dataclass(frozen=True)
class Arrangement:
    """A batch's pictures in the order in which they are computed: by their lengths, those of one grid together.

    Attributes:
        rows: ``[packed]``: which patch of the batch each packed one is; None where they lie so.
        positions: ``[packed]``: each packed patch's row in the distinct grids' positions, joined.
        grids: The distinct grids, in the order in which they come.
        lengths: ``(patches, pictures)`` for every length, ascending.
        cu_seqlens: int64 ``[B + 1]`` in host memory: the packed pictures' offsets.
        order: ``[B]``: where each picture of the batch lies among the packed ones.
        tokens: A permutation ``[packed]``, and its inverse, that puts packed tokens in the order of the pictures.
    """

    rows: Tensor | None
    positions: Tensor
    grids: list[Grid]
    lengths: list[tuple[int, int]]
    cu_seqlens: Tensor
    order: Tensor
    tokens: tuple[Tensor, Tensor]


def arrange(batch: NaFlexBatch, device: torch.device, dropped: float = 0.0) -> Arrangement:
    """Arrange a batch on the host; what a device needs goes there in one copy.

    Args:
        batch: The pictures.
        device: Where they are computed.
        dropped: The share of each picture's patches that is left out, drawn at random.
    """
    grids = [(rows, columns) for rows, columns in batch.grids.tolist()]
    distinct = {grid: i for i, grid in enumerate(dict.fromkeys(grids))}
    by_length = (batch.lengths * (int(batch.grids.max()) + 1) + batch.grids[:, 0]).sort(stable=True).indices
    lengths, begins = batch.lengths[by_length], batch.cu_seqlens[:-1][by_length]
    kept, drawn = (lengths, None) if not dropped else _drawn(lengths, dropped)
    cu_seqlens = offsets_of(kept)
    # each packed patch's place among those of its picture that are kept, and among all
    within = torch.arange(int(cu_seqlens[-1]), device="cpu") - cu_seqlens[:-1].repeat_interleave(kept)
    places = within if drawn is None else drawn
    rows = places + begins.repeat_interleave(kept)
    first = offsets_of(torch.tensor([rows * columns for rows, columns in distinct], device="cpu"))
    of_picture = first[torch.tensor([distinct[grid] for grid in grids], device="cpu")]
    positions = places + of_picture[by_length].repeat_interleave(kept)
    order = inverse(by_length)
    sorted_back = within + offsets_of(kept[order])[:-1][by_length].repeat_interleave(kept)
    offsets, rows, positions, order, back, there = transfer.together(
        [cu_seqlens.int(), rows, positions, order, inverse(sorted_back), sorted_back], device
    )
    attention_packed.remember(cu_seqlens, kept, int(cu_seqlens[-1]), None if device.type == "cpu" else offsets)
    in_order = drawn is None and bool((by_length.diff() > 0).all())
    counts = zip(*(t.tolist() for t in kept.unique_consecutive(return_counts=True)), strict=True)
    rows = None if in_order else rows
    return Arrangement(rows, positions, list(distinct), list(counts), cu_seqlens, order, (back, there))


def _drawn(lengths: Tensor, dropped: float) -> tuple[Tensor, Tensor]:
    """Return how many patches of each picture are kept, and which, as :class:`PatchDropout` draws them."""
    kept, places = [], []
    for n, count in zip(*(t.tolist() for t in lengths.unique_consecutive(return_counts=True)), strict=True):
        kept += [max(1, int(n * (1 - dropped)))] * count
        places.append(torch.randn(count, n, device="cpu").topk(kept[-1], dim=-1).indices.flatten())
    return torch.tensor(kept, device="cpu"), torch.cat(places)


def check_batch(batch: NaFlexBatch, patch_size: int, weight: Tensor) -> None:
    """Raise unless a batch's patches are of a size, and in a dtype and on the device that ``weight`` can use."""
    if batch.patch_size != patch_size:
        raise ValueError(f"images: got patches of {batch.patch_size} pixels a side, expected {patch_size}, the model's")
    if batch.device != weight.device:
        raise ValueError(f"images: got device {batch.device}, expected {weight.device}, where the model is")
    if batch.dtype != weight.dtype and not torch.is_autocast_enabled(batch.device.type):
        raise TypeError(f"images: got {batch.dtype}, expected {weight.dtype}, the model's dtype: images.to(dtype)")


@uncompiled(_NOT_COMPILED, recursive=False)
def features_of(tower: nn.Module, batch: NaFlexBatch) -> Tensor:
    """Return a ViT's pooled features ``[B, E]``, not normalised, in the order of the pictures."""
    begun = _begin(tower, batch)
    if begun is None:
        return torch.stack(_grid_by_grid(batch, tower._features))
    arranged, x = begun
    return _pooled(tower, tower.transformer(x, arranged.cu_seqlens), arranged)


@uncompiled(_NOT_COMPILED, recursive=False)
def tokens_of(tower: nn.Module, batch: NaFlexBatch) -> Tensor:
    """Return a ViT's tokens ``[total, W]``, as its ``forward_features`` does, in the order of the pictures."""
    begun = _begin(tower, batch)
    if begun is None:
        return torch.cat(_grid_by_grid(batch, tower.forward_features))
    arranged, x = begun
    x = tower.transformer(x, arranged.cu_seqlens)
    if not tower.final_ln_after_pool:
        x = tower.ln_post(x)
    return x if arranged.rows is None else attention_packed.permute(x, *arranged.tokens)


def takes_packed(tower: nn.Module) -> bool:
    """Return whether nobody would notice that the parts of a ViT are given packed rows."""
    takes_rows = getattr(tower.transformer, "takes_rows", None)
    rowwise = [tower.ln_pre, tower.ln_post, tower.patch_dropout, tower.attn_pool]
    if tower.attn_pool is not None:
        rowwise.append(getattr(tower.attn_pool, "attn", None))
    return (
        takes_rows is not None
        and takes_rows()
        and is_untouched(tower.conv1, plainness.CONVOLUTIONS)
        and all(is_untouched(part, _FORWARDS) for part in rowwise if part is not None)
        and (tower.attn_pool is None or not is_observed(tower.attn_pool))
    )


@uncompiled(_NOT_COMPILED)
def _begin(tower: nn.Module, batch: NaFlexBatch) -> tuple[Arrangement, Tensor] | None:
    """Return what goes into the first block, ``[packed, W]``, or None where nothing is packed."""
    check_batch(batch, tower.patch_size, tower.conv1.weight)
    if not takes_packed(tower):
        return None
    dropped = tower.patch_dropout.prob if tower.training else 0.0
    arranged = arrange(batch, batch.device, dropped)
    patches = batch.patches if arranged.rows is None else batch.patches.index_select(0, arranged.rows)
    x = tower._product(patches)
    table = positions_for(tower, tower.positional_embedding, tower.grid_size, arranged.grids, patches)
    table = torch.cat(table) if len(table) > 1 else table[0]
    # gradients of many pictures add up in no fewer bits than 32
    table = table.to(torch.promote_types(table.dtype, torch.float32) if table.requires_grad else x.dtype)
    # whose gradient is added up in one order, unlike that of an index
    x = x + F.embedding(arranged.positions, table).to(x.dtype)
    return arranged, x if tower.ln_pre is None else tower.ln_pre(x)


@uncompiled(_NOT_COMPILED)
def _pooled(tower: nn.Module, x: Tensor, arranged: Arrangement) -> Tensor:
    """Return features ``[B, E]`` of the last block's tokens, in the order of the pictures."""
    features = tower._project(pooled(tower, x, lambda tokens: _means(tokens, arranged), arranged.cu_seqlens))
    return features.index_select(0, arranged.order)


def _means(x: Tensor, arranged: Arrangement) -> Tensor:
    """Return the mean ``[B, W]`` of each picture's tokens, in the order in which they are packed."""
    parts = x.split([n * count for n, count in arranged.lengths])
    means = [part.unflatten(0, (-1, n)).mean(dim=1) for part, (n, _) in zip(parts, arranged.lengths, strict=True)]
    return torch.cat(means)


def _grid_by_grid(batch: NaFlexBatch, compute: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Return what ``compute`` makes of each picture, of those of one grid at once: modules see images ``[b, 3, H, W]``.

    Args:
        batch: The pictures.
        compute: Gives ``[b, ...]`` for images.
    """
    by_grid: dict[Grid, list[int]] = {}
    for i, (rows, columns) in enumerate(batch.grids.tolist()):
        by_grid.setdefault((rows, columns), []).append(i)
    pictures = batch.patches.split(batch.lengths.tolist())
    results: list[Tensor] = [batch.patches] * len(batch)
    for grid, indices in by_grid.items():
        images = uncut(torch.stack([pictures[i] for i in indices]), grid, batch.patch_size)
        for i, result in zip(indices, compute(images), strict=True):
            results[i] = result
    return results
