"""Which loss a model learns by: CLIP's softmax over a batch, or SigLIP's sigmoid of every pair, with its settings."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from clipfast import ops
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig
from clipfast.train.config import Loss

# Zhai et al. (2023), section 3.2: nearly all pairs of a batch are wrong ones, which no first step should have to learn
INIT_LOGIT_SCALE = math.log(10)
INIT_LOGIT_BIAS = -10.0


def loss_of(model: CLIP, wanted: Loss) -> Literal["clip", "siglip"]:
    """Return the loss that a model learns by: what is wanted, or with ``"auto"`` the sigmoid where it has a bias.

    Raises:
        ValueError: The sigmoid loss is wanted for a model without ``logit_bias``.
    """
    if wanted == "siglip" and model.logit_bias is None:
        raise ValueError("loss: got 'siglip' and a model without logit_bias, expected one made with init_logit_bias")
    if wanted == "auto":
        return "clip" if model.logit_bias is None else "siglip"
    return wanted


def config_for(config: CLIPConfig, wanted: Loss) -> CLIPConfig:
    """Return a configuration with the scale and bias that a loss begins with: it has a bias if that is the sigmoid.

    A bias that it has stays, and its scale if it says one.
    """
    has_bias = config.init_logit_bias is not None
    if wanted == "siglip" and not has_bias:
        return replace(config, init_logit_scale=INIT_LOGIT_SCALE, init_logit_bias=INIT_LOGIT_BIAS)
    if wanted == "clip" and has_bias:
        return replace(config, init_logit_scale=None, init_logit_bias=None)
    if has_bias and config.init_logit_scale is None:
        return replace(config, init_logit_scale=INIT_LOGIT_SCALE)
    return config


@torch.no_grad()
def fit_to(model: CLIP, config: CLIPConfig) -> CLIP:
    """Make a model whose weights are of the other loss one of ``config``, in place.

    A bias begins where the configuration says, and the scale with it: a softmax's scale, 100 in most weights, would put
    every sigmoid at its end. A softmax goes on with the sigmoid's scale.
    """
    if config.init_logit_bias is None:
        model.logit_bias = None
    elif model.logit_bias is None:
        model.logit_bias = nn.Parameter(torch.full_like(model.logit_scale, config.init_logit_bias))
        if config.init_logit_scale is not None:
            model.logit_scale.fill_(config.init_logit_scale)
    model.config = config
    return model


def held_out_loss(model: CLIP, loss: Literal["clip", "siglip"], image: Tensor, text: Tensor) -> Tensor:
    """Return a model's loss of features ``[N, D]`` of unit length as one batch."""
    scale = float(model.logit_scale.detach().exp())
    if loss == "siglip":
        return ops.siglip_loss(image, text, scale, logit_bias=float(model.logit_bias.detach()))
    return ops.contrastive_loss(image, text, scale)
