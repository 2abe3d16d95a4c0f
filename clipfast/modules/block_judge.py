"""What is known of a single block: its options, and whether it computes what :mod:`clipfast.modules.block` says."""

from __future__ import annotations

from types import MethodType

from torch import nn

from clipfast.modules import plainness
from clipfast.modules.block import MLP, ResidualAttentionBlock, SelfAttention
from clipfast.modules.block_states import ADAPTED, CHANGED, PLAIN, is_as_defined, is_rowwise
from clipfast.modules.norm import LayerNorm, LayerScale


def options_of(block: nn.Module) -> tuple[int, bool, str, float, float]:
    """Return a block's heads, mask, GELU and its norms' epsilons."""
    return block.attn.heads, block.attn.causal, block.mlp.approximate, block.ln_1.eps, block.ln_2.eps


def state_of(block: nn.Module) -> str:
    """Return whether a block's parameters say all that it computes, or which of its parts have to be called."""
    if not (
        is_as_defined(block, ResidualAttentionBlock, weights=False)
        and is_as_defined(block.attn, SelfAttention, weights=False)
        and is_as_defined(block.mlp, MLP, weights=False)
        and all(is_as_defined(norm, LayerNorm, weights=False) for norm in (block.ln_1, block.ln_2))
    ):
        return CHANGED
    scales = (block.ls_1, block.ls_2) if block.has_layer_scale else ()
    if not all(is_as_defined(scale, LayerScale, weights=False) for scale in scales):
        return CHANGED
    linears = (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj)
    parts = ((block, ResidualAttentionBlock), (block.attn, SelfAttention), (block.mlp, MLP))
    norms = ((norm, LayerNorm) for norm in (block.ln_1, block.ln_2))
    if all(is_as_defined(*part) for part in (*parts, *norms)) and all(_is_plain(linear) for linear in linears):
        # packed weights have no place for the factors of LayerScale: the modules compute them
        return ADAPTED if scales else PLAIN
    return ADAPTED if all(is_rowwise(linear) for linear in linears) else CHANGED


def _is_plain(linear: nn.Module) -> bool:
    return type(linear) in plainness.LINEARS and linear.bias is not None and plainness.departure(linear) is None


def is_own(block: nn.Module) -> bool:
    """Return to a compiler whether a block and its attention compute what this file says."""
    return (
        isinstance(block, ResidualAttentionBlock)
        and type(block).forward is ResidualAttentionBlock.forward
        and isinstance(block.forward, MethodType)
        and isinstance(block.attn, SelfAttention)
        and type(block.attn).forward is SelfAttention.forward
        and type(block.attn).forward_one is SelfAttention.forward_one
        and isinstance(block.attn.forward, MethodType)
        and isinstance(block.mlp.forward, MethodType)
    )
