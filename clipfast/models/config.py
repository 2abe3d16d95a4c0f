"""The sizes of CLIP models: named ones, and your own from a dataclass, a dict or a JSON file."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from clipfast.models.named import rows
from clipfast.models.open_clip_config import of_file, translated
from clipfast.models.preprocess import PreprocessConfig


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
        pool_type: How tokens become features: ``"tok"`` (class token), ``"avg"`` (mean of the patches) or ``"map"``
            (SigLIP's attention pooling). This and what follows is for ViT only.
        class_token: Whether a learned token lies before the patches.
        reg_tokens: How many register tokens do, too.
        no_ln_pre: Whether the LayerNorm before the first block is left out.
        final_ln_after_pool: Whether the last LayerNorm is applied to the mean and not to the tokens.
        patch_bias: Whether the embedding of patches has a bias.
        norm_eps: The LayerNorms' epsilon.
        approximate: The GELU, as in :class:`CLIPConfig`; None is the model's.
        ls_init_value: Where LayerScale's factors start; None leaves them out.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        proj_type: ``"linear"``, or ``"none"`` for features of the tower's own width, without a projection.
        naflex: Whether images of any aspect come as packed patches.
        preprocess_cfg: How pictures become input (ResNets too). The resizing does not count for ``naflex``.
    """

    image_size: int | tuple[int, int] = 224
    layers: int | tuple[int, ...] = 12
    width: int = 768
    head_width: int = 64
    mlp_ratio: float = 4.0
    patch_size: int | None = 16
    patch_dropout: float = 0.0
    pool_type: str = "tok"
    class_token: bool = True
    reg_tokens: int = 0
    no_ln_pre: bool = False
    final_ln_after_pool: bool = False
    patch_bias: bool = False
    norm_eps: float = 1e-5
    approximate: str | None = None
    ls_init_value: float | None = None
    qkv_bias: bool = True
    proj_type: str = "linear"
    naflex: bool = False
    preprocess_cfg: PreprocessConfig = field(default_factory=PreprocessConfig)

    def __post_init__(self) -> None:
        if isinstance(self.preprocess_cfg, Mapping):
            object.__setattr__(self, "preprocess_cfg", PreprocessConfig.from_dict(self.preprocess_cfg))
        # JSON has lists where these have tuples
        for name in ("layers", "image_size"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.layers, tuple):
            _only_for_vit(self)

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
        pool_type: Where features are read: ``"eos"``, ``"argmax"`` (the largest id), ``"last"`` or ``"first"``.
        no_causal_mask: Whether a token attends to all others, padding too.
        proj_bias: Whether the projection is a linear layer with a bias.
        proj_type: ``"linear"``, or ``"none"`` for features of the tower's own width, without a projection.
        norm_eps: The LayerNorms' epsilon.
        approximate: The GELU, as in :class:`CLIPConfig`; None is the model's.
        ls_init_value: Where LayerScale's factors start; None leaves them out.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    heads: int = 8
    layers: int = 12
    mlp_ratio: float = 4.0
    eos_id: int | None = None
    pool_type: str = "eos"
    no_causal_mask: bool = False
    proj_bias: bool = False
    proj_type: str = "linear"
    norm_eps: float = 1e-5
    approximate: str | None = None
    ls_init_value: float | None = None
    qkv_bias: bool = True


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP model.

    Attributes:
        embed_dim: Width of the space that both towers' features lie in.
        vision_cfg: The image tower.
        text_cfg: The text tower.
        approximate: The GELU of all transformers: ``"none"`` (erf, open_clip's own weights), ``"tanh"`` or
            ``"quick"`` (OpenAI's weights).
        init_logit_scale: Where the learned temperature starts, as a logarithm; None is ``ln(1 / 0.07)``.
        init_logit_bias: Where the learned bias of SigLIP's loss starts; None leaves it out.
    """

    embed_dim: int = 512
    vision_cfg: VisionConfig = field(default_factory=VisionConfig)
    text_cfg: TextConfig = field(default_factory=TextConfig)
    approximate: str = "none"
    init_logit_scale: float | None = None
    init_logit_bias: float | None = None

    def __post_init__(self) -> None:
        # JSON may have ints where these have floats
        for name in ("init_logit_scale", "init_logit_bias"):
            if isinstance(getattr(self, name), int):
                object.__setattr__(self, name, float(getattr(self, name)))
        for part in ("vision_cfg", "text_cfg"):
            tower = getattr(self, part)
            _check_sizes(tower, part)
            projection = getattr(tower, "proj_type", "linear")
            if projection not in ("linear", "none"):
                raise ValueError(f"{part}.proj_type: got {projection!r}, expected 'linear' or 'none'")
            if projection == "none" and tower.width != self.embed_dim:
                raise ValueError(
                    f"{part}.proj_type: got 'none' with a width of {tower.width}, expected one of embed_dim = "
                    f"{self.embed_dim}"
                )

    @property
    def vision_approximate(self) -> str:
        """The GELU of the image tower."""
        return self.approximate if self.vision_cfg.approximate is None else self.vision_cfg.approximate

    @property
    def text_approximate(self) -> str:
        """The GELU of the text tower."""
        return self.approximate if self.text_cfg.approximate is None else self.text_cfg.approximate

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CLIPConfig:
        """Make a configuration from a dict with this class's keys; those of open_clip's files are understood too.

        Raises:
            ValueError: A key is unknown, or asks for what is not served.
        """
        values = translated(values)
        for name, kind in (("vision_cfg", VisionConfig), ("text_cfg", TextConfig)):
            if isinstance(values.get(name), Mapping):
                values[name] = _from_fields(kind, values[name], name + ".")
            elif name in values and not isinstance(values[name], kind):
                raise ValueError(f"{name}: got {values[name]!r}, expected a dict of a tower's sizes")
        return _from_fields(cls, values, "")

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict that JSON can hold and :meth:`from_dict` reads."""
        return dataclasses.asdict(self)


def _only_for_vit(vision: VisionConfig) -> None:
    """Refuse what a ResNet would not heed."""
    fields = dataclasses.fields(vision)
    options = fields[[f.name for f in fields].index("pool_type") :]
    for option in options:
        value = getattr(vision, option.name)
        if option.name != "preprocess_cfg" and value != option.default:
            raise ValueError(
                f"vision_cfg.{option.name}: got {value!r} with a ResNet's layers, expected {option.default!r}"
            )


def _check_sizes(tower: VisionConfig | TextConfig, part: str) -> None:
    """Refuse numbers that no tower can have."""
    for name, least in (("width", 1), ("image_size", 1), ("context_length", 1), ("vocab_size", 1), ("reg_tokens", 0)):
        value = getattr(tower, name, least)
        sides = value if name == "image_size" and isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(isinstance(side, int) and not isinstance(side, bool) and side >= least for side in sides):
            raise ValueError(f"{part}.{name}: got {value!r}, expected a whole number, at least {least}")
    if isinstance(getattr(tower, "layers", None), int) and getattr(tower, "patch_size", 1) is None:
        raise ValueError(f"{part}.patch_size: got None, expected pixels a side: the tower is a ViT")
    eps, factor = tower.norm_eps, tower.ls_init_value
    if not _is_number(eps) or eps <= 0:
        raise ValueError(f"{part}.norm_eps: got {eps!r}, expected a number above 0")
    if factor is not None and not _is_number(factor):
        raise ValueError(f"{part}.ls_init_value: got {factor!r}, expected a number, or None without LayerScale")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _from_fields(kind: type, values: Mapping[str, Any], prefix: str) -> Any:
    known = [f.name for f in dataclasses.fields(kind)]
    for name in values:
        if name not in known:
            raise ValueError(f"configuration key: got {prefix + name!r}{_nearest(name, known)}")
    return kind(**values)


def _nearest(name: str, known: list[str]) -> str:
    """Return ``, expected …``: the names nearest to a wrong one, or those that there are where none is near."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    shown = known if len(known) <= _MOST_SHOWN else [*known[:_MOST_SHOWN], f"… ({len(known)} in all)"]
    return f", expected one of {', '.join(shown)}"


# names that a message lists
_MOST_SHOWN = 24


@cache
def _named() -> dict[str, CLIPConfig]:
    """Return the named models; who brings a configuration of his own does not wait for them."""
    return {name: CLIPConfig.from_dict(row) for name, row in rows().items()}


def list_models() -> list[str]:
    """Return the names that :func:`clipfast.create_model` knows; see :mod:`clipfast.models.named`."""
    return list(_named())


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
    if name in _named():
        return _named()[name]
    if name.endswith(".json"):
        try:
            values = json.loads(Path(name).read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"model: got {name}, expected a configuration in JSON and UTF-8: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"model: got {name} with a {type(values).__name__}, expected an object of JSON")
        return CLIPConfig.from_dict(of_file(values))
    raise ValueError(f"model name: got {name!r}{_nearest(name, list_models())}")
