"""A CLIP as training runs it: text tower first, in a precision, on one rank or shared by many."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from clipfast import ops
from clipfast.models.clip import CLIP
from clipfast.modules.naflex import NaFlexBatch
from clipfast.ops.contrastive_ranks import TextExchange
from clipfast.train.config import Precision, Strategy
from clipfast.train.workplace import Workplace

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_NORMS = (nn.modules.batchnorm._BatchNorm,)


class Features(NamedTuple):
    """What the towers give for one batch or a part of one.

    Attributes:
        image: ``[b, D]``, of unit length, in float32 at least; None without images.
        text: ``[b, D]``; None without tokens.
        logit_scale: A scalar.
        sent: The texts on their way to the other ranks, where they were sent.
        logit_bias: A scalar; None for a model without one.
    """

    image: Tensor | None
    text: Tensor | None
    logit_scale: Tensor
    sent: TextExchange | None = None
    logit_bias: Tensor | None = None

    @property
    def scalars(self) -> tuple[Tensor, Tensor | None]:
        """The scale and the bias of the logits."""
        return self.logit_scale, self.logit_bias


class Towers(nn.Module):
    """Both towers of a model, in the order in which ranks wait the least: texts travel while images are encoded.

    A tower that has nothing to learn keeps no activations and has no backward pass.

    Args:
        model: The model.
        precision: ``"fp32"``; ``"bf16"`` and ``"fp16"`` for autocast around the towers; ``"pure_bf16"`` for a model
            that is bfloat16 itself.
        workplace: The ranks that share a batch.
    """

    def __init__(self, model: CLIP, precision: Precision, workplace: Workplace) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.workplace = workplace

    def forward(
        self,
        images: Tensor | NaFlexBatch | None,
        tokens: Tensor | None,
        seeds: tuple[int, int] | None = None,
        send: bool = False,
        equal_batches: bool = False,
    ) -> Features:
        """Encode images ``[b, 3, H, W]``, or packed patches, and tokens ``[b, L]``, or one of them.

        Args:
            images: The pictures.
            tokens: The captions.
            seeds: What each tower's random numbers (dropout) start from: text's, then image's.
            send: Whether to send the texts to the other ranks at once.
            equal_batches: The promise that all ranks hold equally many rows.
        """
        text = image = sent = None
        if tokens is not None:
            _seed(seeds and seeds[0])
            text = self._normalized(self.model.encode_text, tokens, self.text_learns)
            if send:
                sent = ops.send_texts(text, self.workplace.group, equal_batches=equal_batches)
        if images is not None:
            _seed(seeds and seeds[1])
            images = images.to(self.model.visual.conv1.weight.dtype)
            image = self._normalized(self.model.encode_image, images, self.image_learns)
        bias = self.model.logit_bias
        return Features(image, text, self.model.logit_scale.exp(), sent, None if bias is None else bias.clone())

    @property
    def image_learns(self) -> bool:
        """Whether any weight of the image tower wants a gradient."""
        return any(p.requires_grad for p in self.model.visual.parameters())

    @property
    def text_learns(self) -> bool:
        """Whether any weight of the text tower wants a gradient."""
        others = ("visual.", "logit_scale", "logit_bias")
        return any(p.requires_grad for n, p in self.model.named_parameters() if not n.startswith(others))

    def _normalized(self, encode: nn.Module, inputs: Tensor | NaFlexBatch, learns: bool) -> Tensor:
        grad = nullcontext() if learns else torch.no_grad()
        # where the weights are: captions may lie in host memory
        with autocast_of(self.precision, self.workplace.device), grad:
            features = encode(inputs)
        # logits need more than sixteen bits
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def autocast_of(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast that the towers run under."""
    dtype = _AUTOCAST.get(precision)
    return torch.autocast(device.type, dtype) if dtype else nullcontext()


def _seed(seed: int | None) -> None:
    if seed is not None:
        torch.manual_seed(seed)


def share_towers(towers: Towers, strategy: Strategy) -> nn.Module:
    """Wrap towers for the ranks of their workplace: DDP, or FSDP2 with every block a unit of its own.

    Source: Zhao et al., "PyTorch FSDP" (2023); Li et al., "PyTorch Distributed" (2020).
    """
    workplace = towers.workplace
    if workplace.group is None:
        return towers
    if strategy == "ddp":
        devices = [workplace.device] if workplace.device.type == "cuda" else None
        return DistributedDataParallel(towers, device_ids=devices, gradient_as_bucket_view=True)
    model = towers.model
    # in bfloat16 the blocks, which hold nearly all weights; what comes out of the last one is float32 again
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32)
    policy = half if towers.precision == "pure_bf16" else MixedPrecisionPolicy()
    for tower in (model.visual, model):
        for block in getattr(getattr(tower, "transformer", None), "resblocks", ()):
            fully_shard(block, mp_policy=policy)
    # FSDP2 takes no scalars: they stay whole on every rank
    fully_shard(towers, ignored_params={p for p in model.parameters() if p.dim() == 0})
    return towers


def halve(model: nn.Module) -> None:
    """Make a model bfloat16 in place, but for scalars and BatchNorm: their sums need more than eight bits."""
    for module in model.modules():
        if isinstance(module, _NORMS):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dim():
                parameter.data = parameter.data.to(torch.bfloat16)
