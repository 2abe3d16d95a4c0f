"""Accelerated models under DDP: two ranks' gradients are those of the original on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import clipfast

FAMILIES = ("open_clip", "transformers", "timm", "torchvision")


def case_of(family: str) -> tuple[torch.nn.Module, dict[str, Tensor]]:
    """Return the original in float64 and four samples."""
    import torchvision_on_cpu

    torchvision_on_cpu.enable()
    import tiny
    from rivals import captions
    from torchvision.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    images, tokens = torch.randn(4, 3, 32, 32, dtype=torch.float64), captions(4, 16, 100)
    if family == "open_clip":
        return tiny.open_clip_clip().double(), {"image": images, "text": tokens}
    if family == "transformers":
        return tiny.transformers_clip().double(), {"pixel_values": images, "input_ids": tokens}
    if family == "timm":
        return tiny.timm_vit().double(), {"x": images}
    model = tiny.drawn(VisionTransformer(32, 16, 2, 2, 64, 256, num_classes=10))
    torch.nn.init.normal_(model.heads.head.weight)
    return model.double(), {"x": images}


def loss(output: Any) -> Tensor:
    """Return a loss that is the mean of those of the samples."""
    if isinstance(output, Tensor):
        return output.square().sum(dim=-1).mean()
    image, text = (output["image_embeds"], output["text_embeds"]) if isinstance(output, dict) else output[:2]
    return (image[:, :3] * text[:, :3]).sum(dim=-1).mean()


def rank_gradients(rank: int, ranks: int, family: str) -> dict[str, Any]:
    model, samples = case_of(family)
    clipfast.accelerate(model)
    # the scale takes no part in the loss
    wrapped = DistributedDataParallel(model, find_unused_parameters=hasattr(model, "logit_scale"))
    loss(wrapped(**{k: v[rank * 2 : rank * 2 + 2] for k, v in samples.items()})).backward()
    return {k: p.grad.tolist() for k, p in model.named_parameters() if p.grad is not None and k != "logit_scale"}


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks(family: str) -> None:
    model, samples = case_of(family)
    loss(model(**samples)).backward()
    expected = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    largest = max(float(g.abs().max()) for g in expected.values())
    for gradients in run_on_ranks(rank_gradients, 2, family):
        assert gradients.keys() == expected.keys()
        for key, value in gradients.items():
            error = (torch.tensor(value, dtype=torch.float64) - expected[key]).abs().max()
            assert error <= 1e-12 * largest, key
