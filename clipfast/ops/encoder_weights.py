"""The weights of a transformer that infers on the CPU, as each implementation of the packed encoder takes them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# tokens that oneDNN's implementation takes at a time: what lies between two steps stays in reach of the caches
ONEDNN_CHUNK = 2048


def folds_quick_gelu(approximate: str, dtype: torch.dtype) -> bool:
    """Return whether oneDNN's swish is QuickGELU, with the factor in the weights on both sides of it."""
    # scaled weights would be rounded once more in bfloat16
    return approximate == "quick" and dtype == torch.float32


@dataclass(frozen=True)
class BlockWeights:
    """The parameters of one block, ``[out, in]`` as those of linear layers, all in one dtype.

    Attributes:
        ln_1: Weight and bias ``[W]`` of the LayerNorm before attention.
        qkv: Weight ``[3·W, W]`` and bias of the projection to queries, keys and values.
        out: Weight ``[W, W]`` and bias of the projection behind attention.
        ln_2: Weight and bias ``[W]`` of the LayerNorm before the MLP.
        fc: Weight ``[hidden, W]`` and bias of the MLP's first layer.
        proj: Weight ``[W, hidden]`` and bias of its second.
    """

    ln_1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    out: tuple[Tensor, Tensor]
    ln_2: tuple[Tensor, Tensor]
    fc: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all twelve."""
        return *self.ln_1, *self.qkv, *self.out, *self.ln_2, *self.fc, *self.proj

    def to(self, dtype: torch.dtype) -> BlockWeights:
        """Return the block with all twelve in a dtype; itself where they are."""
        if all(t.dtype == dtype for t in self.tensors()):
            return self
        pairs = (self.ln_1, self.qkv, self.out, self.ln_2, self.fc, self.proj)
        return BlockWeights(*((w.detach().to(dtype), b.detach().to(dtype)) for w, b in pairs))


class PackedEncoder:
    """A transformer's weights, packed by the implementation that first needs them.

    The packed copies take as much memory as the weights do.

    Args:
        blocks: The blocks, first to last.
        heads: The number of heads.
        causal: Whether a token attends to itself and those before it only.
        approximate: The GELU, as in :func:`clipfast.ops.bias_gelu`.
        eps: The LayerNorms'.
        dtype: What is computed in; None for the weights' own. Biases and LayerNorms keep theirs where they can.
    """

    def __init__(
        self,
        blocks: Sequence[BlockWeights],
        heads: int,
        causal: bool,
        approximate: str,
        eps: float,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._blocks = tuple(blocks)
        self.dtype = dtype or self._blocks[0].ln_1[0].dtype
        self._native: list[Tensor] | None = None
        self._onednn: list[tuple[Tensor, ...]] | None = None
        self.heads, self.causal, self.approximate, self.eps = heads, causal, approximate, eps
        #: The width of tokens, and that of the MLPs.
        self.width, self.hidden = self._blocks[0].ln_1[0].shape[0], self._blocks[0].fc[0].shape[0]

    def set_options(self, heads: int, causal: bool, approximate: str, eps: float) -> None:
        """Take other options than those it was made with; the arguments are the constructor's."""
        if (heads, causal, approximate, eps) != (self.heads, self.causal, self.approximate, self.eps):
            self._native = self._onednn = None
            self.heads, self.causal, self.approximate, self.eps = heads, causal, approximate, eps

    @functools.cached_property
    def blocks(self) -> tuple[BlockWeights, ...]:
        """The blocks in the dtype that is computed in, first to last."""
        return tuple(block.to(self.dtype) for block in self._blocks)

    def native_weights(self) -> list[Tensor]:
        """Return the weights as ``clipfast::encode`` takes them."""
        # two threads that come first at the same time pack twice, and either result serves
        if self._native is None:
            pack = torch.ops.clipfast.pack_weight
            weights: list[Tensor] = []
            for b in self._blocks:
                for (weight, bias), packed in (
                    (b.ln_1, False), (b.qkv, True), (b.out, True), (b.ln_2, False), (b.fc, True), (b.proj, True)
                ):  # fmt: skip
                    weight = weight.detach()
                    weights.append(pack(weight.to(self.dtype).contiguous()) if packed else weight.float())
                    weights.append(bias.detach().float().contiguous())
            self._native = weights
        return self._native

    def onednn_weights(self) -> list[tuple[Tensor, ...]]:
        """Return the packed weights of each block's four layers, and of the last block's keys and values."""
        if self._onednn is None:
            pack = torch.ops.mkldnn._reorder_linear_weight
            layers = [[w.detach() for w, _ in (b.qkv, b.out, b.fc, b.proj)] for b in self.blocks]
            if folds_quick_gelu(self.approximate, self.dtype):
                # x·σ(1.702·x) = silu(1.702·x) / 1.702
                for weights in layers:
                    weights[2], weights[3] = weights[2] * 1.702, weights[3] / 1.702
            layers[-1].append(layers[-1][0][self.width :].contiguous())
            self._onednn = [tuple(pack(w.contiguous(), ONEDNN_CHUNK) for w in weights) for weights in layers]
        return self._onednn
