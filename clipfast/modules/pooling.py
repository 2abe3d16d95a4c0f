"""Pooling of tokens to one vector by attention: the MAP head of SigLIP."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast import ops
from clipfast.modules import inference
from clipfast.modules.block import MLP, Read, SelfAttention
from clipfast.modules.norm import LayerNorm

#: How an image tower's tokens become one vector.
POOLINGS = ("tok", "avg", "map")


def check_pooling(pool_type: str, class_token: bool, final_ln_after_pool: bool) -> None:
    """Raise ValueError unless an image tower can pool so."""
    if pool_type not in POOLINGS:
        raise ValueError(f"ViT(pool_type): got {pool_type!r}, expected one of {', '.join(map(repr, POOLINGS))}")
    if pool_type == "tok" and not class_token:
        raise ValueError("ViT(pool_type): got 'tok' without a class token, expected 'avg' or 'map'")
    if pool_type == "map" and final_ln_after_pool:
        raise ValueError(
            "ViT(final_ln_after_pool): got True with pool_type 'map', expected False: the pooling has its own"
        )


def pooled(tower: nn.Module, x: Tensor, mean: Callable[[Tensor], Tensor], cu_seqlens: Tensor | None = None) -> Tensor:
    """Return ``[S, W]`` from an image tower's last tokens by its ``pool_type``, ``"map"`` or ``"avg"``.

    Args:
        tower: Has ``pool_type``, ``attn_pool``, ``ln_post`` and ``final_ln_after_pool``.
        x: ``[S, N, W]``, or ``[total, W]`` of packed pictures.
        mean: Gives ``[S, W]``, the mean of each picture's tokens.
        cu_seqlens: Offsets ``[S + 1]`` of packed pictures.
    """
    if tower.pool_type == "map":
        x = tower.ln_post(x)
        return tower.attn_pool(x) if cu_seqlens is None else tower.attn_pool(x, cu_seqlens)
    return tower.ln_post(mean(x)) if tower.final_ln_after_pool else mean(tower.ln_post(x))


class ProbeAttention(SelfAttention):
    """Attention of one learned query to the tokens of each sequence, with the parameters of self-attention."""

    def forward(self, x: Tensor, probe: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return ``[S, W]``.

        Args:
            x: ``[S, N, W]``, or ``[total, W]`` with ``cu_seqlens``: every token gives a key and a value, once.
            probe: ``[W]``, what asks, in every sequence.
            cu_seqlens: Offsets ``[S + 1]`` of packed sequences, none of them empty.
        """
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        # projected once for all
        query, key, value = self._project_one(x, probe[None], 0)
        query = query.expand(sequences, -1)
        return self.out_proj(ops.single_query_attention(query, key, value, self.heads, cu_seqlens=cu_seqlens))

    def _project_one(self, x: Tensor, query: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        width, (weight, bias) = x.shape[-1], self.qkv_parameters()
        # weights that are made anew for every call cannot be kept
        if weight is self.in_proj_weight:
            both = inference.linear(self, x.flatten(0, -2), weight, lambda w: w, bias, first=width)
            if both is not None:
                query = F.linear(query, weight[:width], None if bias is None else bias[:width])
                return query, *both.unflatten(0, x.shape[:-1]).chunk(2, dim=-1)
        return super()._project_one(x, query, read)

    def weights(self, x: Tensor, probe: Tensor) -> Tensor:
        """Return the attention weights ``[B, H, N]`` of the probe for ``[B, N, W]``."""
        query, key, _ = self._project_one(x, probe[None], 0)
        query, key = query.unflatten(-1, (self.heads, -1)), key.unflatten(-1, (self.heads, -1))
        scores = torch.einsum("qhd,bnhd->bhn", query * query.shape[-1] ** -0.5, key)
        return scores.softmax(dim=-1)


class AttentionPool(nn.Module):
    """The multi-head attention pooling (MAP) head: ``y + MLP(LayerNorm(y))`` of ``y``, what a learned probe attends to.

    It equals timm's ``AttentionPoolLatent`` and transformers' ``SiglipMultiheadAttentionPoolingHead``.

    Args:
        width: The width W of tokens.
        heads: The number of heads.
        mlp_ratio: The MLP's hidden width over W.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        norm_eps: The LayerNorm's epsilon.

    Source: Zhai et al., "Scaling Vision Transformers" (2021), after Lee et al., "Set Transformer" (2018).
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, approximate: str = "none", norm_eps: float = 1e-6
    ) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.randn(width) * width**-0.5)
        self.attn = ProbeAttention(width, heads)
        self.ln = LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, int(width * mlp_ratio), approximate)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """Return ``[S, W]`` from ``[S, N, W]``, or from ``[total, W]`` with the offsets ``[S + 1]`` of sequences."""
        y = self.attn(x, self.probe.to(x.dtype), cu_seqlens)
        return y + self.mlp(self.ln(y))

    def weights(self, x: Tensor) -> Tensor:
        """Return the probe's attention weights ``[B, H, N]`` for ``[B, N, W]``."""
        return self.attn.weights(x, self.probe)
