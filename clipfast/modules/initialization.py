"""How SigLIP's towers start: as big_vision draws them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def init_as_big_vision(tower: nn.Module) -> None:
    """Draw the weights of a tower, an image tower or one of text, as big_vision does.

    Linear layers are Xavier-uniform, those to queries, keys and values each for itself; MLPs' biases are normal with
    1e-6; patches and projections LeCun-normal; positions and embeddings of tokens normal with ``W ** -0.5``; other
    biases zero; LayerNorms the identity.

    Args:
        tower: A :class:`~clipfast.ViT` or a text tower.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023): big_vision's ``models/vit.py`` and
    ``models/proj/image_text/text_transformer.py``.
    """
    width = tower.transformer.width
    for block in tower.transformer.resblocks:
        _init_block(block.attn, block.mlp)
    nn.init.normal_(tower.positional_embedding, std=width**-0.5)
    for name in ("class_embedding", "reg_tokens"):
        if hasattr(tower, name):
            nn.init.zeros_(getattr(tower, name))
    if hasattr(tower, "token_embedding"):
        nn.init.normal_(tower.token_embedding.weight, std=width**-0.5)
        _lecun_normal(tower.text_projection, width)
    if hasattr(tower, "conv1"):
        _lecun_normal(tower.conv1, tower.conv1.weight[0].numel())
        _lecun_normal(tower.proj, width)
    pool = getattr(tower, "attn_pool", None)
    if pool is not None:
        _init_block(pool.attn, pool.mlp)
        # of a kernel [1, 1, W]: one input, W outputs
        bound = math.sqrt(6 / (1 + width))
        nn.init.uniform_(pool.probe, -bound, bound)


def _init_block(attention: nn.Module, mlp: nn.Module) -> None:
    for weight in (*attention.in_proj_weight.chunk(3), attention.out_proj.weight):
        nn.init.xavier_uniform_(weight)
    if attention.in_proj_bias is not None:
        nn.init.zeros_(attention.in_proj_bias)
    nn.init.zeros_(attention.out_proj.bias)
    for linear in (mlp.c_fc, mlp.c_proj):
        nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(linear.bias, std=1e-6)


def _lecun_normal(part: nn.Module | Tensor | None, inputs: int) -> None:
    """Draw from a normal cut at two of its deviations, with the variance ``1 / inputs`` that is left after the cut."""
    if part is None:
        return
    weight = part.weight if isinstance(part, nn.Module) else part
    std = inputs**-0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    if isinstance(part, nn.Module) and part.bias is not None:
        nn.init.zeros_(part.bias)
