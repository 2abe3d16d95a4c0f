"""What the configuration beside a file of weights says of them: what keys do not tell."""

from __future__ import annotations

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
    folder = _folder_of(Path(path))
    if folder is None:
        return {}
    config = read_config(folder / "config.json")
    if family := _family(config):
        return {
            tower: frozenset({GELUS.get(name, name)})
            for tower, part in _parts(config).items()
            for name in [part.get("hidden_act", _HIDDEN_ACT[family])]
        }
    sizes = read_config(folder / "open_clip_config.json").get("model_cfg")
    if not isinstance(sizes, dict):
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
    folder = _folder_of(Path(path))
    if folder is None:
        return None
    theirs = read_config(folder / "config.json")
    if family := _family(theirs):
        vision = _parts(theirs).get("image", {})
        if _is_siglip2(theirs):
            side = math.isqrt(_whole(vision.get("num_patches", 256)) or 0)
            return (side, side) if side else None
        return _grid({"image_size": 224, "patch_size": _PATCH_SIZE[family]} | vision)
    return _grid(_own_or_open_clips(folder).get("vision_cfg"))


def stated_heads(path: str | os.PathLike[str]) -> tuple[int | None, int | None]:
    """Return the heads of image and text tower by the configuration beside weights; None where it says none.

    Raises:
        ValueError: The configuration is not JSON.
    """
    folder = _folder_of(Path(path))
    if folder is None:
        return None, None
    theirs = read_config(folder / "config.json")
    if family := _family(theirs):
        left_out = {"image": 12, "text": 12 if family == "siglip" else 8}
        heads = {t: _whole(part.get("num_attention_heads", left_out[t])) for t, part in _parts(theirs).items()}
        return heads.get("image"), heads.get("text")
    sizes = _own_or_open_clips(folder)
    vision, text = (sizes.get(name) if isinstance(sizes.get(name), dict) else {} for name in ("vision_cfg", "text_cfg"))
    width, head_width = _whole(vision.get("width")), _whole(vision.get("head_width", 64))
    return width // head_width if width and head_width else None, _whole(text.get("heads"))


def stated_naflex(path: str | os.PathLike[str]) -> bool:
    """Tell whether the configuration beside weights is a NaFlex model's.

    Raises:
        ValueError: The configuration is not JSON.
    """
    folder = _folder_of(Path(path))
    if folder is None:
        return False
    theirs = read_config(folder / "config.json")
    if _family(theirs):
        return _is_siglip2(theirs)
    vision = _own_or_open_clips(folder).get("vision_cfg")
    return isinstance(vision, dict) and vision.get("naflex") is True


def stated_norm_after_pool(path: str | os.PathLike[str]) -> bool:
    """Tell whether the configuration beside weights puts the image tower's last norm behind the pooling.

    Raises:
        ValueError: The configuration is not JSON.
    """
    folder = _folder_of(Path(path))
    vision = None if folder is None else _own_or_open_clips(folder).get("vision_cfg")
    return isinstance(vision, dict) and vision.get("final_ln_after_pool") is True


def _family(config: Mapping[str, Any]) -> str | None:
    """Return the family of transformers' configuration: ``"clip"``, ``"metaclip_2"`` or ``"siglip"``."""
    kind = str(config.get("model_type"))
    return next((family for family in _HIDDEN_ACT if kind.startswith(family)), None)


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


def _own_or_open_clips(folder: Path) -> Mapping[str, Any]:
    open_clips = read_config(folder / "open_clip_config.json").get("model_cfg")
    return open_clips if isinstance(open_clips, dict) else read_config(folder / "model.json")


def _grid(vision: Any) -> tuple[int, int] | None:
    if not isinstance(vision, dict) or not isinstance(vision.get("patch_size"), int) or vision["patch_size"] < 1:
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
