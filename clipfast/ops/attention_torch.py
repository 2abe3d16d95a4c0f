"""Attention in PyTorch: the specification, and its own fused operator."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import attention_packed


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> Tensor:
    """Return attention's output by ``scaled_dot_product_attention``; arguments as those of every implementation."""
    if cu_seqlens is not None:
        return attention_packed.attention(qkv, causal, cu_seqlens, scale)
    query, key, value = _heads_first(qkv)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale)
    return out.transpose(1, 2).flatten(2)


def reference(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> Tensor:
    """The specification: every weight is formed, one sequence at a time where they are packed."""
    if cu_seqlens is None:
        value = _heads_first(qkv)[2]
        return (weights(qkv, causal, scale) @ value).transpose(1, 2).flatten(2)
    sequences = qkv.tensor_split(cu_seqlens[1:-1].long().cpu())
    parts = [reference(s[None], causal, None, scale)[0] for s in sequences if s.shape[0] > 0]
    return torch.cat(parts) if parts else qkv[:, 0].flatten(1)


def weights(qkv: Tensor, causal: bool, scale: float) -> Tensor:
    """Return the softmax weights ``[B, H, N, N]`` (query, key) of ``[B, N, 3, H, D]``."""
    query, key, _ = _heads_first(qkv)
    scores = (query * scale) @ key.transpose(-2, -1)
    if causal:
        n = scores.shape[-1]
        future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(future, -math.inf)
    return scores.softmax(dim=-1)


def _heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return views ``[B, H, N, D]`` of the queries, keys and values."""
    # taken apart first: the gradients are then stacked as qkv lies, and nothing copies them once more
    query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
    return query, key, value
