"""transformers' towers that are accelerated: of CLIP, MetaCLIP 2, SigLIP and SigLIP 2, in a whole model or alone.

Served by transformers' own code: calls that ask for attention weights, with ``position_ids``, a mask that changes what
is returned, or arguments that only an attention implementation knows.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.models.clip import modeling_clip
from transformers.models.metaclip_2 import modeling_metaclip_2
from transformers.models.siglip import modeling_siglip
from transformers.models.siglip2 import modeling_siglip2

from clipfast.models.transformers_naflex import NaFlexTower
from clipfast.models.transformers_text import SiglipTextTower, TextTower
from clipfast.models.transformers_vision import Siglip2Head, SiglipHead, SiglipVisionTower, VisionTower

_FORWARD = ("forward",)
KINDS: tuple[tuple[type, type, tuple[str, ...]], ...] = (
    (modeling_clip.CLIPVisionModel, VisionTower, _FORWARD),
    (modeling_clip.CLIPTextModel, TextTower, _FORWARD),
    (modeling_metaclip_2.MetaClip2VisionModel, VisionTower, _FORWARD),
    (modeling_metaclip_2.MetaClip2TextModel, TextTower, _FORWARD),
    (modeling_siglip.SiglipVisionModel, SiglipVisionTower, _FORWARD),
    (modeling_siglip.SiglipMultiheadAttentionPoolingHead, SiglipHead, _FORWARD),
    (modeling_siglip.SiglipTextModel, SiglipTextTower, _FORWARD),
    (modeling_siglip2.Siglip2VisionModel, NaFlexTower, _FORWARD),
    (modeling_siglip2.Siglip2MultiheadAttentionPoolingHead, Siglip2Head, _FORWARD),
    (modeling_siglip2.Siglip2TextModel, SiglipTextTower, _FORWARD),
)
# those that put their tower's tokens into their own output
_READ_AT_ONCE = (
    modeling_clip.CLIPTextModelWithProjection,
    modeling_metaclip_2.MetaClip2TextModelWithProjection,
)
# those that read nothing but the pooled output of their towers
_READ_POOLED = (
    *_READ_AT_ONCE,
    modeling_clip.CLIPModel,
    modeling_clip.CLIPVisionModelWithProjection,
    modeling_metaclip_2.MetaClip2Model,
    modeling_metaclip_2.MetaClip2VisionModelWithProjection,
    modeling_siglip.SiglipModel,
    modeling_siglip2.Siglip2Model,
)


def left_alone(module: nn.Module) -> str | None:
    """Return why a tower is left as it is; None for what is no tower."""
    return None


def options_for(module: nn.Module, parent: nn.Module | None, *, token_outputs: bool = True) -> dict[str, Any]:
    """Return what an accelerated tower has to know beside itself: whether its tokens are wanted."""
    # other models read the tokens of their towers, whatever the caller of the whole reads
    read_by_parent = isinstance(parent, PreTrainedModel) and not isinstance(parent, _READ_POOLED)
    read_at_once = read_by_parent or isinstance(parent, _READ_AT_ONCE)
    return {"token_outputs": token_outputs or read_by_parent, "lazy": token_outputs and not read_at_once}
