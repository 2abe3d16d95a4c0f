"""A model with what reads its pictures, by open_clip's name and arguments."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clipfast.data.input_transform import transform_of
from clipfast.hints import keywords_told
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig
from clipfast.models.create import create_model
from clipfast.models.open_model import PRECISIONS

_DTYPES = PRECISIONS | {f"pure_{name}": dtype for name, dtype in PRECISIONS.items() if name != "fp32"}


@keywords_told
def create_model_and_transforms(
    model_name: str | os.PathLike[str] | CLIPConfig | Mapping[str, Any],
    pretrained: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    *,
    force_image_size: int | tuple[int, int] | None = None,
    force_context_length: int | None = None,
    image_mean: tuple[float, float, float] | None = None,
    image_std: tuple[float, float, float] | None = None,
    image_interpolation: str | None = None,
    image_resize_mode: str | None = None,
) -> tuple[CLIP, Callable[..., Any], Callable[..., Any]]:
    """Create a model and what reads pictures for it, in the place of open_clip's function of this name.

    Args:
        model_name: As for :func:`clipfast.create_model`.
        pretrained: A file or folder of weights, or a state dict; None draws weights. Nothing is downloaded.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"``: of the weights. Pictures stay float32: convert them.
        device: Where the model lives.
        force_image_size: Pixels a side, or ``(height, width)``, in the place of the model's.
        force_context_length: The longest caption, in tokens, in the place of the model's.
        image_mean, image_std: Of red, green and blue, in the place of the model's.
        image_interpolation: ``"bicubic"`` or ``"bilinear"``.
        image_resize_mode: ``"shortest"``, ``"longest"`` or ``"squash"``.

    Returns:
        ``(model, transform for training, transform for evaluation)``.

    Raises:
        TypeError: An unknown keyword; the message says which was probably meant.
        FileNotFoundError, ValueError: As for :func:`clipfast.create_model`, or an unknown precision.
    """
    if precision not in _DTYPES:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(_DTYPES)}")
    model = create_model(
        model_name,
        pretrained=pretrained or None,
        image_size=force_image_size,
        context_length=force_context_length,
        device=device,
        dtype=_DTYPES[precision],
    )
    given = {
        "mean": image_mean, "std": image_std, "interpolation": image_interpolation, "resize_mode": image_resize_mode,
    }  # fmt: skip
    vision = model.config.vision_cfg
    preprocess = replace(vision.preprocess_cfg, **{k: v for k, v in given.items() if v is not None})
    vision = replace(vision, preprocess_cfg=preprocess)
    model.config = replace(model.config, vision_cfg=vision)
    return model, transform_of(vision, train=True), transform_of(vision)
