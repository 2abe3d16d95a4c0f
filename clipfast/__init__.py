"""clipfast: CLIP training and inference made fast without changing what CLIP computes.

The public names below are imported on first use, so that ``import clipfast`` starts no CUDA context, needs
neither Triton nor the compiled library, and costs little beyond ``import torch``.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"


class _KernelsOfClone:
    """Finds ``clipfast.kernels`` in a clone, where its folder lies beside the package's and not in it."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "clipfast.kernels" or self.package not in (path or ()):
            return None
        from importlib.machinery import PathFinder

        return PathFinder.find_spec(name, [os.path.dirname(self.package)])


# a package that was copied without them may lie beside another one of that name
if not os.path.isdir(os.path.join(__path__[0], "kernels")) and os.path.isdir(os.path.join(__path__[0], "../csrc")):
    # first: the finder of another clone's editable install would give that one's
    sys.meta_path.insert(0, _KernelsOfClone(__path__[0]))

_HOME_OF = {
    "create_model": "clipfast.models.create",
    "create_model_and_transforms": "clipfast.data.with_transforms",
    "open_model": "clipfast.models.open_model",
    "list_models": "clipfast.models.config",
    "CLIPConfig": "clipfast.models.config",
    "VisionConfig": "clipfast.models.config",
    "TextConfig": "clipfast.models.config",
    "CLIP": "clipfast.models.clip",
    "load_weights": "clipfast.models.weights",
    "export": "clipfast.models.export",
    "accelerate": "clipfast.models.accelerate",
    "acceleration": "clipfast.models.accelerate",
    "restore": "clipfast.models.accelerate",
    "warm_up": "clipfast.models.warm_up",
    "graphed": "clipfast.models.graphed",
    "tune": "clipfast.tuning.run",
    "forget_packed_weights": "clipfast.modules.inference",
    "ViT": "clipfast.modules.vit",
    "ModifiedResNet": "clipfast.modules.resnet",
    "TextTransformer": "clipfast.modules.text",
    "ContrastiveLoss": "clipfast.modules.loss",
    "SigLipLoss": "clipfast.modules.loss",
    "DistillClipLoss": "clipfast.modules.distill_loss",
    "Tokenizer": "clipfast.data.tokenizer",
    "tokenize": "clipfast.data.tokenizer",
    "get_tokenizer": "clipfast.data.choose_tokenizer",
    "image_transform": "clipfast.data.transform",
    "naflex_transform": "clipfast.data.naflex",
    "NaFlexBatch": "clipfast.modules.naflex",
    "exact_shortcuts": "clipfast.modules.shortcuts",
    "trim_captions": "clipfast.modules.packing",
    "backend": "clipfast.ops.dispatch",
    "deterministic": "clipfast.ops.dispatch",
    "explain": "clipfast.ops.dispatch",
    "search": "clipfast.embed.find",
}
_ROOMS = ("data", "embed", "evaluate", "models", "modules", "ops", "train", "visualize")

__all__ = ["__version__", *_HOME_OF, *_ROOMS]


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, AttributeError) as error:
        # pip is not asked for a PyTorch of some version, because it would replace the one that is there
        version = getattr(sys.modules.get("torch"), "__version__", "2.10")
        if tuple(map(int, version.split(".")[:2])) >= (2, 10):
            from clipfast.installation import what_is_missing

            if words := what_is_missing(error):
                raise ModuleNotFoundError(words, name=error.name) from None
            raise
        raise ImportError(f"clipfast needs PyTorch 2.10 or later, this is {version}: upgrade PyTorch") from error


def _attribute(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(_import(_HOME_OF[name]), name)
    elif name in _ROOMS:
        value = _import(f"clipfast.{name}")
    else:
        from clipfast.hints import for_name

        raise AttributeError(f"module 'clipfast' has no attribute {name!r}{for_name(name, __all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if not TYPE_CHECKING:
    __getattr__ = _attribute

if TYPE_CHECKING:
    # a checker knows the names below, and finds fault with any other
    from clipfast import data, models, modules, ops
    from clipfast.data.choose_tokenizer import get_tokenizer
    from clipfast.data.naflex import naflex_transform
    from clipfast.data.tokenizer import Tokenizer, tokenize
    from clipfast.data.transform import image_transform
    from clipfast.data.with_transforms import create_model_and_transforms
    from clipfast.embed.embed import embed
    from clipfast.embed.find import search
    from clipfast.evaluate.run import evaluate
    from clipfast.models.accelerate import accelerate, acceleration, restore
    from clipfast.models.clip import CLIP
    from clipfast.models.config import CLIPConfig, TextConfig, VisionConfig, list_models
    from clipfast.models.create import create_model
    from clipfast.models.export import export
    from clipfast.models.graphed import graphed
    from clipfast.models.open_model import open_model
    from clipfast.models.warm_up import warm_up
    from clipfast.models.weights import load_weights
    from clipfast.modules.distill_loss import DistillClipLoss
    from clipfast.modules.inference import forget_packed_weights
    from clipfast.modules.loss import ContrastiveLoss, SigLipLoss
    from clipfast.modules.naflex import NaFlexBatch
    from clipfast.modules.packing import trim_captions
    from clipfast.modules.resnet import ModifiedResNet
    from clipfast.modules.shortcuts import exact_shortcuts
    from clipfast.modules.text import TextTransformer
    from clipfast.modules.vit import ViT
    from clipfast.ops.dispatch import backend, deterministic, explain
    from clipfast.train.start import train
    from clipfast.tuning.run import tune
    from clipfast.visualize.show import show as visualize
