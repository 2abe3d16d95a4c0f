"""torchvision's ``VisionTransformer`` (``vit_*``), accelerated.

Served by clipfast: ``forward``, whose last block is computed for the class token alone. The embedding of patches and
the heads are torchvision's code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vision_transformer

from clipfast.models.accelerated import Accelerated
from clipfast.models.twin_blocks import (
    TwinBlock,
    TwinLayerNorm,
    attention_of_pytorch,
    gelu_of,
    of_type,
    require,
)
from clipfast.models.twin_state import Twin
from clipfast.models.twins import TwinTransformer, TwinViT

_NORMS = (nn.LayerNorm,)


class VisionTower(Accelerated):
    """torchvision's ``VisionTransformer``."""

    replaced_methods = ("forward", "_process_input")
    replaced_children = ("encoder",)

    def make_twin(self) -> Twin:
        """Return the twin of blocks and the last LayerNorm."""
        encoder = of_type(self.encoder, vision_transformer.Encoder, "encoder")
        of_type(encoder.layers, nn.Sequential, "encoder.layers")
        of_type(encoder.dropout, nn.Dropout, "encoder.dropout")
        blocks = [_block(block, name) for name, block in encoder.layers.named_children()]
        tower = TwinViT(TwinTransformer(blocks, lambda: False), TwinLayerNorm(encoder.ln, _NORMS, "encoder.ln"))
        return Twin(self, tower, self.replaced_children)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the heads give, ``[B, classes]``."""
        twin = self.serving_twin()
        if twin is None:
            return super().forward(x)
        x = self._process_input(x)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.heads(twin(x + self.encoder.pos_embedding))


KINDS: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (vision_transformer.VisionTransformer, VisionTower, VisionTower.replaced_methods),
)


def left_alone(module: nn.Module) -> str | None:
    """Return why a tower is left as it is; None for what is no tower."""
    return None


def options_for(module: nn.Module, parent: nn.Module | None, **wanted: Any) -> dict[str, Any]:
    """Return what an accelerated tower has to know beside itself: nothing here."""
    return {}


def _block(source: nn.Module, name: str) -> TwinBlock:
    of_type(source, vision_transformer.EncoderBlock, name)
    of_type(source.dropout, nn.Dropout, f"{name}'s dropout")
    mlp = of_type(source.mlp, vision_transformer.MLPBlock, f"{name}'s MLP")
    kinds = [type(part) for part in mlp]
    require(
        len(kinds) == 5 and kinds[2] is nn.Dropout and kinds[4] is nn.Dropout,
        f"{name}'s MLP has parts that are not known",
    )
    return TwinBlock(
        TwinLayerNorm(source.ln_1, _NORMS, f"{name}'s ln_1"),
        attention_of_pytorch(source.self_attention, f"{name}'s attention"),
        TwinLayerNorm(source.ln_2, _NORMS, f"{name}'s ln_2"),
        mlp[0],
        mlp[3],
        gelu_of(mlp[1], {}, f"{name}'s activation"),
        name,
    )
