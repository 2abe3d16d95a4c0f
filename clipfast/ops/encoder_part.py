"""Some of the blocks of a packed transformer, one behind the other, without packing them again."""

from __future__ import annotations

from torch import Tensor

from clipfast.ops.encoder import BlockWeights, PackedEncoder


class EncoderPart(PackedEncoder):
    """The blocks ``first`` to ``last`` (not included) of a :class:`~clipfast.ops.encoder.PackedEncoder`.

    It gives every token: what only the last block's reading of one token needs, it has no packed weights of.

    Args:
        whole: The encoder.
        first, last: The blocks.
    """

    def __init__(self, whole: PackedEncoder, first: int, last: int) -> None:
        super().__init__(
            whole._blocks[first:last], whole.heads, whole.causal, whole.approximate, whole.eps, whole.dtype
        )
        self._whole, self._range = whole, slice(first, last)

    @property
    def blocks(self) -> tuple[BlockWeights, ...]:
        """The blocks in the dtype that is computed in, first to last."""
        return self._whole.blocks[self._range]

    def native_weights(self) -> list[Tensor]:
        """Return the weights as ``clipfast::encode`` takes them."""
        weights = self._whole.native_weights()
        each = len(weights) // len(self._whole._blocks)
        return weights[each * self._range.start : each * self._range.stop]

    def onednn_weights(self) -> list[tuple[Tensor, ...]]:
        """Return the packed weights of each block's four layers."""
        return self._whole.onednn_weights()[self._range]
