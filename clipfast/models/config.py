"""The sizes of CLIP models: named ones, and your own from a dataclass, a dict or a JSON file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower, with open_clip's field names.

    Attributes:
        image_size: Pixels a side, or ``(height, width)`` (ViT only).
        layers: Blocks of a ViT; four stages' bottlenecks make it a ModifiedResNet.
        width: Width of a ViT's tokens; channels after a ResNet's stem.
        head_width: Width of an attention head.
        mlp_ratio: The MLPs' hidden width over ``width`` (ViT only).
        patch_size: Pixels a patch's side (ViT only).
        patch_dropout: Share of patches dropped in training (ViT only).
    """

    image_size: int | tuple[int, int] = 224
    layers: int | tuple[int, ...] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | None = 16
    patch_dropout: float = 0.0

    def __post_init__(self) -> None:
        # JSON has lists where these have tuples
        for name in ("layers", "image_size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def heads(self) -> int:
        """The number of attention heads."""
        width = self.width if isinstance(self.layers, int) else self.width * 32
        if width % self.head_width:
            raise ValueError(f"vision_cfg.head_width: got {self.head_width}, expected a divisor of the width {width}")
        return width // self.head_width


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower, with open_clip's field names.

    Attributes:
        context_length: The longest caption, in tokens.
        vocab_size: The number of token ids.
        width: Width of tokens.
        heads: The number of attention heads.
        layers: The number of blocks.
        mlp_ratio: The MLPs' hidden width over ``width``.
        eos_id: Id of the end-of-text token, where features are read; None is the last id, as in CLIP's vocabulary.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    eos_id: int | None = None


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP model.

    Attributes:
        embed_dim: Width of the space that both towers' features lie in.
        vision_cfg: The image tower.
        text_cfg: The text tower.
        approximate: The GELU of all transformers: ``"none"`` (erf, open_clip's own weights), ``"tanh"`` or
            ``"quick"`` (OpenAI's weights).
    """

    embed_dim: int = 512
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    approximate: str = "none"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """Make a configuration from a dict with this class's keys; open_clip's ``quick_gelu`` is understood too.

        Raises:
            ValueError: A key is unknown.
        """
        values = dict(values)
        quick = values.pop("quick_gelu", False)
        if quick:
            values.setdefault("approximate", "quick")
        for name, kind in (("vision_cfg", VisionConfig), ("text_cfg", TextConfig)):
            if isinstance(values.get(name), Mapping):
                values[name] = _from_fields(kind, values[name], name + ".")
        return _from_fields(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold and :meth:`from_dict` reads."""
        return dataclasses.asdict(self)


def _from_fields(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise ValueError(f"configuration key: got {prefix + name!r}{_nearest(name, known)}")
    return kind(**values)


def _nearest(name: str, known: list[str]) -> str:
    """Return ``, expected …``: the names nearest to a wrong one, or all where none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else f", expected one of {', '.join(known)}"


def _vit(
    embed: int,
    width: int,
    layers: int,
    patch: int,
    pixels: int,
    text: tuple[int, int],
    head: int = 64,
    text_layers: int = 12,
) -> CLIPConfig:
    vision = VisionConfig(pixels, layers, width, head, patch_size=patch)
    return CLIPConfig(embed, vision, TextConfig(width=text[0], heads=text[1], layers=text_layers))


def _resnet(embed: int, width: int, layers: tuple[int, ...], pixels: int, text: tuple[int, int]) -> CLIPConfig:
    vision = VisionConfig(pixels, layers, width, patch_size=None)
    return CLIPConfig(embed, vision, TextConfig(width=text[0], heads=text[1]))


# Radford et al. (2021), table 20; H/14 from LAION-2B's OpenCLIP models
_NAMED = {
    "ViT-B-32": _vit(512, 768, 12, 32, 224, (512, 8)),
    "ViT-B-16": _vit(512, 768, 12, 16, 224, (512, 8)),
    "ViT-L-14": _vit(768, 1024, 24, 14, 224, (768, 12)),
    "ViT-L-14-336": _vit(768, 1024, 24, 14, 336, (768, 12)),
    "ViT-H-14": _vit(1024, 1280, 32, 14, 224, (1024, 16), head=80, text_layers=24),
    "RN50": _resnet(1024, 64, (3, 4, 6, 3), 224, (512, 8)),
    "RN101": _resnet(512, 64, (3, 4, 23, 3), 224, (512, 8)),
    "RN50x4": _resnet(640, 80, (4, 6, 10, 6), 288, (640, 10)),
    "RN50x16": _resnet(768, 96, (6, 8, 18, 8), 384, (768, 12)),
    "RN50x64": _resnet(1024, 128, (3, 15, 36, 10), 448, (1024, 16)),
}
_NAMED |= {f"{name}-quickgelu": dataclasses.replace(config, approximate="quick") for name, config in _NAMED.items()}


def list_models() -> list[str]:
    """Return the names that :func:`clipfast.create_model` knows; those with ``-quickgelu`` fit OpenAI's weights."""
    return list(_NAMED)


def get_config(name_or_config: str | os.PathLike[str] | CLIPConfig | Mapping[str, Any]) -> CLIPConfig:
    """Return the configuration of a name, a JSON file, a dict or itself; see :func:`clipfast.create_model`."""
    if isinstance(name_or_config, CLIPConfig):
        return name_or_config
    if isinstance(name_or_config, Mapping):
        return CLIPConfig.from_dict(name_or_config)
    if not isinstance(name_or_config, (str, os.PathLike)):
        raise TypeError(
            f"name_or_config: got {type(name_or_config).__name__}, expected a model's name, a CLIPConfig, a dict or "
            f"the path of a JSON file"
        )
    name = os.fspath(name_or_config)
    if name in _NAMED:
        return _NAMED[name]
    if name.endswith(".json"):
        try:
            values = json.loads(Path(name).read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model: got {name}, expected a configuration in JSON and UTF-8: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"model: got {name} with a {type(values).__name__}, expected an object of JSON")
        # open_clip's files on model hubs keep the sizes under this key
        return CLIPConfig.from_dict(values.get("model_cfg", values))
    raise ValueError(f"model name: got {name!r}{_nearest(name, list_models())}")
