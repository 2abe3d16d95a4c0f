"""The models of a run: the one that learns, with what its loss needs, and its teacher."""

from __future__ import annotations

from dataclasses import replace

from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig, get_config
from clipfast.models.create import create_model
from clipfast.train.config import RunConfig


def config_of_run(config: RunConfig) -> CLIPConfig:
    """Return the configuration of the model that a run trains.

    Raises:
        ValueError, OSError: There is no such model.
    """
    sizes = get_config(config.model)
    if config.patch_dropout:
        sizes = replace(sizes, vision_cfg=replace(sizes.vision_cfg, patch_dropout=config.patch_dropout))
    return sizes


def make_teacher(config: RunConfig, own: CLIPConfig) -> CLIP | None:
    """Return the teacher of a run, which reads the pictures and captions of its model ``own``; None without one.

    Raises:
        ValueError, OSError: There is no such model, its weights do not fit, or its inputs are of other sizes.
    """
    if config.distill_model is None:
        return None
    sizes = get_config(config.distill_model)
    for name, of_teacher, of_model in (
        ("image_size", sizes.vision_cfg.image_size, own.vision_cfg.image_size),
        ("context_length", sizes.text_cfg.context_length, own.text_cfg.context_length),
        ("vocab_size", sizes.text_cfg.vocab_size, own.text_cfg.vocab_size),
    ):
        if of_teacher != of_model:
            raise ValueError(f"distill_model: got {name} {of_teacher}, expected {of_model}, as the model's")
    return create_model(sizes, weights=config.distill_weights)
