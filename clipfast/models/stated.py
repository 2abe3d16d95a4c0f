"""What the configuration beside a file of weights says of them: what keys do not tell."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipfast.models.checkpoint_files import INDEXES_IN_FOLDERS, NAMES_IN_FOLDERS, read_config

# transformers' names of the GELUs, as this project's ``approximate``
GELUS = {"quick_gelu": "quick", "gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}

# what transformers leaves out of a configuration has these values
_HIDDEN_ACT = {"clip": "quick_gelu", "metaclip_2": "quick_gelu", "siglip": "gelu_pytorch_tanh"}
_PATCH_SIZE = {"clip": 32, "metaclip_2": 32, "siglip": 16}


def stated_gelus(path: str | os.PathLike[str]) -> dict[str, frozenset[str]]:
    """Return what ``approximate`` may be of the towers that the configuration beside weights speaks of.

    Keys do not tell which GELU a model was trained with, but transformers' ``config.json`` and open_clip's
    ``open_clip_config.json`` do.

    Returns:
        By ``"image"`` and ``"text"``; a tower that no configuration speaks of is left out.

    Raises:
        ValueError: The configuration is not JSON.
    """
    stated = _Stated(path)
    if family := stated.family:
        return {
            tower: frozenset({GELUS.get(name, name)})
            for tower, part in _parts(stated.theirs).items()
            for name in [part.get("hidden_act", _HIDDEN_ACT[family])]
        }
    sizes = stated.open_clips
    if sizes is None:
        return {}
    # erf GELU stands in for tanh in open_clip's own models of SigLIP: which one was trained, it does not say
    gelus = frozenset({"quick"} if sizes.get("quick_gelu") else {"none", "tanh"})
    return {"image": gelus, "text": gelus}


def stated_grid(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Return the grid of patches, ``(rows, columns)``, by the configuration beside weights; None where it says none.

    Read are transformers' ``config.json``, open_clip's ``open_clip_config.json`` and this project's ``model.json``.

    Raises:
        ValueError: The configuration is not JSON.
    """
    stated = _Stated(path)
    if family := stated.family:
        vision = _parts(stated.theirs).get("image", {})
        if _is_siglip2(stated.theirs):
            side = math.isqrt(_whole(vision.get("num_patches", 256)) or 0)
            return (side, side) if side else None
        return _grid({"image_size": 224, "patch_size": _PATCH_SIZE[family]} | vision)
    return _grid(stated.tower("vision_cfg"))


def stated_heads(path: str | os.PathLike[str]) -> tuple[int | None, int | None]:
    """Return the heads of image and text tower by the configuration beside weights; None where it says none.

    Raises:
        ValueError: The configuration is not JSON.
    """
    stated = _Stated(path)
    if family := stated.family:
        left_out = {"image": 12, "text": 12 if family == "siglip" else 8}
        heads = {t: _whole(part.get("num_attention_heads", left_out[t])) for t, part in _parts(stated.theirs).items()}
        return heads.get("image"), heads.get("text")
    vision, text = stated.tower("vision_cfg"), stated.tower("text_cfg")
    width, head_width = _whole(vision.get("width")), _whole(vision.get("head_width", 64))
    return width // head_width if width and head_width else None, _whole(text.get("heads"))


def stated_naflex(path: str | os.PathLike[str]) -> bool:
    """Tell whether the configuration beside weights is a NaFlex model's.

    Raises:
        ValueError: The configuration is not JSON.
    """
    stated = _Stated(path)
    if stated.family:
        return _is_siglip2(stated.theirs)
    return stated.tower("vision_cfg").get("naflex") is True


def stated_norm_after_pool(path: str | os.PathLike[str]) -> bool:
    """Tell whether the configuration beside weights puts the image tower's last norm behind the pooling.

    Raises:
        ValueError: The configuration is not JSON.
    """
    return _Stated(path).tower("vision_cfg").get("final_ln_after_pool") is True


class _Stated:
    """The configurations beside weights, each read when it is asked for; without a folder of theirs all are empty."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = _folder_of(Path(path))

    @functools.cached_property
    def theirs(self) -> Mapping[str, Any]:
        """What transformers' says."""
        return self._read("config.json")

    @property
    def family(self) -> str | None:
        """The family of transformers' configuration, ``"clip"``, ``"metaclip_2"`` or ``"siglip"``; None of others."""
        kind = str(self.theirs.get("model_type"))
        return next((family for family in _HIDDEN_ACT if kind.startswith(family)), None)

    @functools.cached_property
    def open_clips(self) -> Mapping[str, Any] | None:
        """What open_clip's says of the model; None where there is none."""
        sizes = self._read("open_clip_config.json").get("model_cfg")
        return sizes if isinstance(sizes, dict) else None

    def tower(self, name: str) -> Mapping[str, Any]:
        """Return a tower's part of open_clip's or this project's configuration; empty where it says nothing of it."""
        part = (self._own if self.open_clips is None else self.open_clips).get(name)
        return part if isinstance(part, dict) else {}

    @functools.cached_property
    def _own(self) -> Mapping[str, Any]:
        return self._read("model.json")

    def _read(self, name: str) -> Mapping[str, Any]:
        return {} if self._folder is None else read_config(self._folder / name)


def _is_siglip2(config: Mapping[str, Any]) -> bool:
    return str(config.get("model_type")).startswith("siglip2")


def _parts(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the towers' parts of transformers' configuration, or what a tower alone or a whole model leaves out."""
    parts = {
        tower: config[name]
        for tower, name in (("image", "vision_config"), ("text", "text_config"))
        if isinstance(config.get(name), dict)
    }
    if parts:
        return parts
    kind = str(config.get("model_type"))
    towers = ("image",) if "vision" in kind else ("text",) if "text" in kind else ("image", "text")
    # a whole model's own entries are no tower's
    return {tower: config if len(towers) == 1 else {} for tower in towers}


def _grid(vision: Mapping[str, Any]) -> tuple[int, int] | None:
    if not isinstance(vision.get("patch_size"), int) or vision["patch_size"] < 1:
        return None
    sides = vision.get("image_size", 224)
    sides = [sides, sides] if isinstance(sides, int) else sides
    if not isinstance(sides, list) or len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        return None
    return sides[0] // vision["patch_size"], sides[1] // vision["patch_size"]


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and value > 0 else None


def _folder_of(path: Path) -> Path | None:
    """Return the folder whose configuration speaks of the weights at ``path``."""
    if path.is_dir():
        return path
    return path.parent if path.name in NAMES_IN_FOLDERS + INDEXES_IN_FOLDERS else None
