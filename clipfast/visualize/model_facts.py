"""Which model and which weights a figure is of, and what the numbers of that model mean."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from clipfast.evaluate.probabilities import sigmoid_of
from clipfast.models.clip import CLIP
from clipfast.models.open_model import weights_digest
from clipfast.modules.vit import ViT


@dataclass(frozen=True)
class ModelFacts:
    """What a page and its figures say of a model.

    Attributes:
        model: What it is called.
        weights: Where they are from, which ones they are, and whether they were ever trained.
        towers: What they are.
        scores: What makes logits of cosines.
    """

    model: str
    weights: str
    towers: str
    scores: str

    @property
    def line(self) -> str:
        """All that a figure by itself has to say."""
        return f"{self.model} · weights: {self.weights}"

    def rows(self) -> list[tuple[str, str]]:
        """Return the facts for a table, each with its heading."""
        return [("model", self.model), ("weights", self.weights), ("towers", self.towers), ("scores", self.scores)]


def facts_of(model: CLIP, source: Mapping[str, str] | None = None) -> ModelFacts:
    """Return what is to be said of a model.

    Args:
        model: The model.
        source: Where it is from: ``spec`` and perhaps ``weights``; None where it was made in Python.
    """
    digest = f"SHA-256 {weights_digest(model.state_dict())[:12]}…"
    random = untrained_towers(model)
    if len(random) == 2:
        weights = f"random weights, never trained ({digest})"
    else:
        place = "those in memory" if source is None else source.get("weights", "its own")
        weights = f"{place} ({digest})"
        if random:
            weights += f"; random weights, never trained, in the {random[0]} tower"
    return ModelFacts(
        "a model made in Python" if source is None else source["spec"], weights, _towers(model), _scores(model)
    )


def untrained_towers(model: CLIP) -> list[str]:
    """Return which of ``"image"`` and ``"text"`` is as it was drawn: no scale or shift of its norms was ever moved."""
    of_image = set(model.visual.modules())
    towers = {
        "image": [module for module in model.modules() if module in of_image],
        "text": [module for module in model.modules() if module not in of_image],
    }
    return [name for name, modules in towers.items() if all(map(_is_as_made, modules))]


def _is_as_made(module: nn.Module) -> bool:
    if not isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)):
        return True
    weight, bias = module.weight, module.bias
    # a ResNet's blocks begin with the identity: the last norm of each has scales of zero
    same = weight is None or bool((weight == weight[0]).all() and weight[0] in (0, 1))
    return same and (bias is None or not bias.count_nonzero())


def _towers(model: CLIP) -> str:
    vision, text = model.config.vision_cfg, model.config.text_cfg
    size = vision.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = f"ViT, patches of {vision.patch_size}" if isinstance(model.visual, ViT) else "ResNet"
    count = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{image}, pictures of {height}×{width} pixels; texts of up to {text.context_length} tokens; "
        f"{count / 1e6:.1f} M parameters"
    )


def _scores(model: CLIP) -> str:
    sigmoid = sigmoid_of(model)
    if sigmoid is not None:
        return f"learned by a sigmoid: logit = {sigmoid.scale:.1f} · cosine {sigmoid.bias:+.1f}"
    return f"learned by a softmax: logit = {logit_scale_of(model):.1f} · cosine"


def logit_scale_of(model: CLIP) -> float:
    """Return the factor between cosines and logits."""
    return float(model.logit_scale.detach().float().exp())


def source_of(model: object, given: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return where a model is from: what was given, or the folder or name that stands for it."""
    if given is None and isinstance(model, (str, os.PathLike)):
        return {"spec": os.fspath(model)}
    return given
