"""The pre-norm transformer that both towers are made of, in OpenAI's key layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast import ops
from clipfast.ops.attention import attention_weights
from clipfast.ops.bias_gelu import check_approximate, kernel_adds_bias


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension with float32 statistics, in and out in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., C]`` from ``[..., C]``."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of ``nn.MultiheadAttention``.

    Args:
        width: The width W of tokens.
        heads: The number of heads.
        causal: Whether a token attends to itself and those before it only.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"SelfAttention(heads): got {heads} for width {width}, expected a divisor of the width")
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]`` from ``[B, N, W]``."""
        return self.out_proj(ops.attention(self._qkv(x), self.heads, causal=self.causal))

    def weights(self, x: Tensor) -> Tensor:
        """Return the attention weights ``[B, H, N, N]`` (query, key) for ``[B, N, W]``."""
        return attention_weights(self._qkv(x), self.heads, causal=self.causal)

    def _qkv(self, x: Tensor) -> Tensor:
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)


class MLP(nn.Module):
    """Two linear layers with a GELU between them.

    Args:
        width: The width W of tokens.
        hidden: The width between the layers.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
    """

    def __init__(self, width: int, hidden: int, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = check_approximate(approximate, "MLP")
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., W]`` from ``[..., W]``."""
        if _is_plain(self.c_fc) and kernel_adds_bias(x, self.c_fc.bias, self.approximate):
            hidden = ops.bias_gelu(F.linear(x, self.c_fc.weight), self.c_fc.bias, self.approximate)
        else:
            hidden = ops.bias_gelu(self.c_fc(x), None, self.approximate)
        return self.c_proj(hidden)


def _is_plain(linear: nn.Module) -> bool:
    """Return whether nobody would notice that a layer's product is taken without calling the layer.

    Layers that were hooked, wrapped, parametrised, quantised or adapted since they were made are called.
    """
    hooked = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and linear.bias is not None and not hooked


class ResidualAttentionBlock(nn.Module):
    """``x + attention(LayerNorm(x))``, then ``x + MLP(LayerNorm(x))``.

    Args:
        width: The width W of tokens.
        heads: The number of heads.
        mlp_ratio: The MLP's hidden width over W.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        causal: Whether a token attends to itself and those before it only.
    """

    def __init__(
        self, width: int, heads: int, mlp_ratio: float = 4.0, approximate: str = "none", causal: bool = False
    ) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads, causal)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), approximate)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]`` from ``[B, N, W]``."""
        y, x = ops.add_layer_norm(self.attn(self.ln_1(x)), x, self.ln_2.weight, self.ln_2.bias, self.ln_2.eps)
        return x + self.mlp(y)


class Transformer(nn.Module):
    """A stack of :class:`ResidualAttentionBlock`.

    Args:
        width: The width W of tokens.
        layers: The number of blocks.
        heads: The number of heads.
        mlp_ratio: The MLPs' hidden width over W.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        causal: Whether a token attends to itself and those before it only.

    Attributes:
        grad_checkpointing: Whether training keeps only each block's input and computes the rest again in the
            backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_ratio: float = 4.0,
        approximate: str = "none",
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.layers = layers
        self.grad_checkpointing = False
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, mlp_ratio, approximate, causal) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, N, W]`` from ``[B, N, W]``."""
        for block in self.resblocks:
            x = self._run(block, x)
        return x

    def intermediates(self, x: Tensor, indices: int | Sequence[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Return the last block's output and those of chosen blocks.

        Args:
            x: ``[B, N, W]``.
            indices: Which blocks: the last n (an int), those named (a sequence; negative counts from the end), or
                all (None).

        Returns:
            ``(final, chosen)``: ``[B, N, W]`` and a list of ``[B, N, W]`` in the order of the blocks.

        Raises:
            ValueError: An index is outside the blocks.
        """
        wanted = self._block_indices(indices)
        chosen = []
        for i, block in enumerate(self.resblocks):
            x = self._run(block, x)
            if i in wanted:
                chosen.append(x)
        return x, chosen

    def attention_maps(self, x: Tensor) -> Tensor:
        """Return every block's attention weights, ``[layers, B, H, N, N]`` (query, key), for ``[B, N, W]``."""
        maps = []
        for block in self.resblocks:
            maps.append(block.attn.weights(block.ln_1(x)))
            x = block(x)
        return torch.stack(maps)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False)
        return block(x)

    def _block_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        if indices is None:
            return set(range(self.layers))
        if isinstance(indices, int):
            if not 0 < indices <= self.layers:
                raise ValueError(f"indices: got {indices}, expected the number of last blocks, 1 to {self.layers}")
            return set(range(self.layers - indices, self.layers))
        wrong = [i for i in indices if not -self.layers <= i < self.layers]
        if wrong:
            raise ValueError(f"indices: got {wrong}, expected block indices within {-self.layers}..{self.layers - 1}")
        return {i % self.layers for i in indices}


def take_tokens(x: Tensor, positions: Tensor) -> Tensor:
    """Return ``[B, W]``: from each sequence of ``[B, N, W]`` the token at its position ``[B]``."""
    return x[torch.arange(x.shape[0], device=x.device), positions]
