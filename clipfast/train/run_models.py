"""The models of a run: the one that learns, with what its loss needs, and its teacher."""

from __future__ import annotations

from dataclasses import replace

from clipfast.models.checkpoint_files import read_state_dict
from clipfast.models.clip import CLIP
from clipfast.models.config import CLIPConfig
from clipfast.models.create import create_model
from clipfast.models.foreign_config import config_of
from clipfast.models.key_layouts import to_openai
from clipfast.train.config import RunConfig
from clipfast.train.objective import INIT_LOGIT_BIAS, config_for, fit_to


def config_of_run(config: RunConfig) -> CLIPConfig:
    """Return the configuration of the model that a run trains, with a bias if it learns by the sigmoid loss.

    Raises:
        ValueError, OSError: There is no such model.
    """
    sizes = config_of(config.model)
    if config.patch_dropout:
        sizes = replace(sizes, vision_cfg=replace(sizes.vision_cfg, patch_dropout=config.patch_dropout))
    return config_for(sizes, config.loss)


def make_model(config: RunConfig, sizes: CLIPConfig) -> CLIP:
    """Return the model that a run begins with: of :func:`config_of_run`'s sizes, with the run's weights if it has any.

    Weights of a model that learned by the other loss are taken too; see :func:`clipfast.train.objective.fit_to`.

    Raises:
        ValueError, OSError: The weights cannot be read, or do not fit.
    """
    if config.weights is None or config.loss == "auto":
        return create_model(sizes, weights=config.weights)
    has_bias = "logit_bias" in to_openai(read_state_dict(config.weights))
    of_weights = replace(sizes, init_logit_bias=INIT_LOGIT_BIAS if has_bias else None)
    return fit_to(create_model(of_weights, weights=config.weights), sizes)


def make_teacher(config: RunConfig, own: CLIPConfig) -> CLIP | None:
    """Return the teacher of a run, which reads the pictures and captions of its model ``own``; None without one.

    Raises:
        ValueError, OSError: There is no such model, its weights do not fit, or its inputs are of other sizes.
    """
    if config.distill_model is None:
        return None
    sizes = config_of(config.distill_model, training=False)
    for name, of_teacher, of_model in (
        ("naflex", sizes.vision_cfg.naflex, own.vision_cfg.naflex),
        # of pictures of any aspect, patches come
        (
            "patch_size",
            *((tower.patch_size if own.vision_cfg.naflex else None) for tower in (sizes.vision_cfg, own.vision_cfg)),
        ),
        # one that was trained with other numbers would see other pictures than it knows
        *(
            (name, getattr(sizes.vision_cfg.preprocess_cfg, name), getattr(own.vision_cfg.preprocess_cfg, name))
            for name in ("mean", "std")
        ),
        ("image_size", sizes.vision_cfg.image_size, own.vision_cfg.image_size),
        ("context_length", sizes.text_cfg.context_length, own.text_cfg.context_length),
        ("vocab_size", sizes.text_cfg.vocab_size, own.text_cfg.vocab_size),
    ):
        if of_teacher != of_model:
            raise ValueError(f"distill_model: got {name} {of_teacher}, expected {of_model}, as the model's")
    return create_model(sizes, weights=config.distill_weights)
