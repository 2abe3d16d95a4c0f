"""The channel-wise parts of a block: LayerNorm, and LayerScale behind a branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clipfast import ops


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension with float32 statistics, in and out in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., C]`` from ``[..., C]``."""
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class LayerScale(nn.Module):
    """A learned factor for every channel of what a branch adds to the residual stream.

    Args:
        width: The width W of tokens.
        init_value: Where the factors start.

    Source: Touvron et al., "Going deeper with Image Transformers" (CaiT, 2021).
    """

    def __init__(self, width: int, init_value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), float(init_value)))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[..., W]`` from ``[..., W]``."""
        return x * self.gamma
