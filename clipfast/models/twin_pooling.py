"""Twins of poolings: clipfast's pooling by attention over another library's modules and Parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from clipfast.models.twin_blocks import TwinAttention, TwinLayerNorm, TwinMLP
from clipfast.modules.block import Read
from clipfast.modules.pooling import AttentionPool, ProbeAttention


class TwinProbeAttention(TwinAttention, ProbeAttention):
    """clipfast's attention of one query to all tokens, with the Parameters of another one.

    Args:
        source: As for :class:`TwinAttention`, or a linear layer for the query and one for keys and values.
        out_proj: The output projection.
        heads: The number of heads.
        name: The attention's name, for refusals.
    """

    def __init__(self, source: Sequence[nn.Module], out_proj: nn.Module, heads: int, *, name: str) -> None:
        super().__init__(source, out_proj, heads, name=name)

    def _project_one(self, x: Tensor, query: Tensor, read: Read) -> tuple[Tensor, Tensor, Tensor]:
        if len(self.source) != 2:
            return super()._project_one(x, query, read)
        key, value = self.source[1](x).chunk(2, dim=-1)
        return self.source[0](query), key, value


class TwinAttentionPool(AttentionPool):
    """clipfast's pooling by attention over another one's parts.

    Args:
        probe: Gives what asks, ``[W]``.
        attention: The attention.
        ln: The LayerNorm before the MLP.
        mlp: The MLP.
    """

    def __init__(
        self, probe: Callable[[], Tensor], attention: TwinProbeAttention, ln: TwinLayerNorm, mlp: TwinMLP
    ) -> None:
        nn.Module.__init__(self)
        self._probe = probe
        self.attn, self.ln, self.mlp = attention, ln, mlp

    @property
    def probe(self) -> Tensor:
        """What asks, ``[W]``."""
        return self._probe()
