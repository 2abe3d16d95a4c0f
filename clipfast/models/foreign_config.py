"""The configuration of a model from its folder: this project's, open_clip's or transformers' file beside weights.

What transformers leaves out of ``config.json`` has the defaults of its configuration classes; what clipfast does not
compute is refused by its name.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipfast.models.checkpoint_files import NAMES_IN_FOLDERS, read_config
from clipfast.models.config import CLIPConfig, TextConfig, VisionConfig, get_config, list_models
from clipfast.models.hub_names import refuse_hub_name
from clipfast.models.model_folder import CONFIG_FILE
from clipfast.models.open_clip_config import of_file
from clipfast.models.preprocess import SIGLIP, PreprocessConfig
from clipfast.models.stated import GELUS

_OPEN_CLIPS, _TRANSFORMERS = "open_clip_config.json", "config.json"
_PREPROCESSOR = "preprocessor_config.json"

# defaults of transformers' configuration classes, version 5.23
_COMMON = {"num_hidden_layers": 12, "attention_dropout": 0.0}
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, **_COMMON}
_CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    **_CLIP,
}
_CLIP_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    **_CLIP,
}
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    **_COMMON,
}
_SIGLIP_VISION = {"num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True, **_SIGLIP}
_SIGLIP2_VISION = {"num_channels": 3, "num_patches": 256, "patch_size": 16, "vision_use_head": True, **_SIGLIP}
_SIGLIP_TEXT = {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None, **_SIGLIP}
_DEFAULTS = {
    "clip": (_CLIP_VISION, _CLIP_TEXT),
    "metaclip_2": (_CLIP_VISION, _CLIP_TEXT),
    "siglip": (_SIGLIP_VISION, _SIGLIP_TEXT),
    "siglip2": (_SIGLIP2_VISION, _SIGLIP_TEXT),
}
# this eos_token_id stands for the largest id in transformers' CLIP: old configurations have it in error
_CLIPS_OLD_EOS = 2


def config_of(
    name_or_config: str | os.PathLike[str] | CLIPConfig | Mapping[str, Any], *, training: bool = True
) -> CLIPConfig:
    """Return the configuration of whatever :func:`clipfast.create_model` takes, folders and transformers' files too.

    Args:
        name_or_config: As for :func:`clipfast.create_model`.
        training: As for :func:`folder_config`.

    Raises:
        FileNotFoundError, TypeError, ValueError: As :func:`clipfast.create_model` raises.
    """
    # the name of a model is no path, even where something of that name lies here
    if isinstance(name_or_config, (str, os.PathLike)) and os.fspath(name_or_config) not in list_models():
        refuse_hub_name(name_or_config)
        path = Path(name_or_config)
        if path.is_dir():
            return folder_config(path, training=training)
        if path.suffix == ".json" and path.is_file() and "model_type" in (values := read_config(path)):
            return _named_in_errors(path, values, training)
        # ViT-B/16 is OpenAI's way to write a name
        near = difflib.get_close_matches(os.fspath(name_or_config), list_models(), n=1, cutoff=0.5)
        if len(path.parts) > 1 and not path.exists() and not near:
            raise FileNotFoundError(
                f"model: got {path}, expected a name of clipfast.list_models(), a JSON file, or a model's folder: none "
                f"is there"
            )
    return get_config(name_or_config)


def folder_config(folder: Path, *, training: bool = True) -> CLIPConfig:
    """Return the configuration that a folder holds.

    Read is ``model.json``, as training here leaves it, open_clip's ``open_clip_config.json`` or transformers'
    ``config.json``: of several, the one of the library whose weights :func:`clipfast.load_weights` would take.

    Args:
        folder: A folder that is there.
        training: Whether what matters in training alone, such as dropout, has to be computed too.

    Raises:
        FileNotFoundError: There is none of these files.
        ValueError: The file is corrupt, of another kind of model, or asks for what is not computed here.
    """
    weights = next((name for name in NAMES_IN_FOLDERS if (folder / name).is_file()), "")
    names = (CONFIG_FILE, _OPEN_CLIPS, _TRANSFORMERS)
    if not weights.startswith("open_clip"):
        names = (CONFIG_FILE, _TRANSFORMERS, _OPEN_CLIPS)
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"model: got the folder {folder}, expected {CONFIG_FILE} in it, as training leaves it, {_OPEN_CLIPS} of "
            f"open_clip or {_TRANSFORMERS} of transformers"
        )
    values = read_config(file)
    if not values:
        raise ValueError(f"model: got {file} without entries, expected a configuration's")
    return _named_in_errors(file, values, training)


def _named_in_errors(file: Path, values: Mapping[str, Any], training: bool) -> CLIPConfig:
    try:
        if file.name == _TRANSFORMERS or "model_type" in values:
            config = transformers_config(values, training=training)
            return _with_preprocessing(config, file.parent / _PREPROCESSOR)
        return CLIPConfig.from_dict(of_file(values))
    except (ValueError, TypeError) as error:
        raise ValueError(f"model: {file}: {error}") from error


def _with_preprocessing(config: CLIPConfig, file: Path) -> CLIPConfig:
    """Return a configuration with what transformers' file says of pictures, where there is one."""
    if not file.is_file():
        return config
    try:
        preprocess = PreprocessConfig.from_transformers(read_config(file))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name}: {error}") from error
    if config.vision_cfg.naflex:
        # pictures of any aspect are resized in a way of their own
        preprocess = replace(config.vision_cfg.preprocess_cfg, mean=preprocess.mean, std=preprocess.std)
    return replace(config, vision_cfg=replace(config.vision_cfg, preprocess_cfg=preprocess))


def transformers_config(values: Mapping[str, Any], *, training: bool = True) -> CLIPConfig:
    """Return what transformers' configuration of a CLIP, MetaClip2, Siglip or Siglip2 model amounts to.

    Keys that transformers ignores are ignored.

    Args:
        values: The content of ``config.json``.
        training: As for :func:`folder_config`.

    Raises:
        ValueError: It is another model's, a tower's alone, or has a value that clipfast does not compute.
    """
    family = values.get("model_type")
    if family not in _DEFAULTS:
        raise ValueError(
            f"model_type: got {_kind_of(values)}, expected a whole model's, one of {', '.join(map(repr, _DEFAULTS))}"
        )
    if values.get("quantization_config"):
        raise ValueError("quantization_config: got one, expected none: quantised weights are not read")
    vision, text = (
        _Part(values, name, defaults, training)
        for name, defaults in zip(("vision_config", "text_config"), _DEFAULTS[family], strict=True)
    )
    vision.expect("num_channels", 3)
    if family in ("clip", "metaclip_2"):
        embed_dim = values.get("projection_dim", 512)
        if not isinstance(embed_dim, int) or embed_dim < 1:
            raise ValueError(f"projection_dim: got {embed_dim!r}, expected a whole number, at least 1")
        return CLIPConfig(embed_dim, _clip_vision(vision), _clip_text(text, family), approximate=text.gelu())
    vision.expect("vision_use_head", True)
    embed_dim, projection = vision.whole("hidden_size"), text.values["projection_size"]
    if (projection or text.whole("hidden_size")) != embed_dim:
        raise ValueError(
            f"text_config.projection_size: got {projection or text.whole('hidden_size')}, expected {embed_dim}, the "
            f"image tower's hidden_size: their features are compared"
        )
    return CLIPConfig(
        embed_dim,
        _siglip_vision(vision, family),
        _siglip_text(text),
        approximate=text.gelu(),
        init_logit_scale=math.log(10),
        init_logit_bias=-10.0,
    )


def _kind_of(values: Mapping[str, Any]) -> str:
    """Say what a configuration is of that is not a whole CLIP's: one tower alone, transformers' or timm's."""
    family = str(values.get("model_type"))
    for ending, tower in (("_vision_model", "an image"), ("_text_model", "a text")):
        if family.endswith(ending):
            return f"{family!r}, {tower} tower alone"
    if "model_type" not in values and "architecture" in values:
        return f"none, in a configuration of timm's {values['architecture']!r}, an image tower alone"
    return repr(values.get("model_type"))


def _clip_vision(part: _Part) -> VisionConfig:
    return VisionConfig(image_size=part.image_size(), **part.vision_sizes())


def _clip_text(part: _Part, family: str) -> TextConfig:
    eos = part.values["eos_token_id"]
    if not isinstance(eos, int):
        raise ValueError(f"text_config.eos_token_id: got {eos!r}, expected one id")
    if family == "clip" and eos == _CLIPS_OLD_EOS:
        return TextConfig(**part.text_sizes(), pool_type="argmax")
    return TextConfig(**part.text_sizes(), eos_id=eos)


def _siglip_vision(part: _Part, family: str) -> VisionConfig:
    size = part.image_size() if family == "siglip" else _side_of(part) * part.patch_size()
    return VisionConfig(
        image_size=size,
        **part.vision_sizes(),
        pool_type="map",
        class_token=False,
        no_ln_pre=True,
        patch_bias=True,
        proj_type="none",
        naflex=family == "siglip2",
        preprocess_cfg=SIGLIP,
    )


def _siglip_text(part: _Part) -> TextConfig:
    return TextConfig(**part.text_sizes(), pool_type="last", no_causal_mask=True, proj_bias=True)


def _side_of(part: _Part) -> int:
    number = part.whole("num_patches")
    side = math.isqrt(number)
    if side * side != number:
        raise ValueError(f"vision_config.num_patches: got {number}, expected a square: positions are a square's")
    return side


class _Part:
    """One tower's part of transformers' configuration, with what it leaves out."""

    def __init__(self, config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], training: bool) -> None:
        given = config.get(name)
        if config.get("model_type") in ("clip", "metaclip_2"):  # these prefer a part of an old name
            given = config.get(f"{name}_dict") or given
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            raise ValueError(f"{name}: got {type(given).__name__}, expected an object")
        self.name = name
        self.values = dict(defaults) | dict(given)
        dropout = self.values["attention_dropout"]
        if training and dropout:
            raise ValueError(
                f"{name}.attention_dropout: got {dropout!r}, expected 0: clipfast has no dropout of attention (for "
                f"inference it does not matter: open_model reads this configuration)"
            )

    def expect(self, key: str, value: object) -> None:
        if self.values[key] != value:
            raise ValueError(
                f"{self.name}.{key}: got {self.values[key]!r}, expected {value!r}, which clipfast computes"
            )

    def whole(self, key: str) -> int:
        value = self.values[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{self.name}.{key}: got {value!r}, expected a whole number, at least 1")
        return value

    def gelu(self) -> str:
        name = self.values["hidden_act"]
        if name not in GELUS:
            raise ValueError(f"{self.name}.hidden_act: got {name!r}, expected one of {', '.join(map(repr, GELUS))}")
        return GELUS[name]

    def eps(self) -> float:
        value = self.values["layer_norm_eps"]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1:
            raise ValueError(f"{self.name}.layer_norm_eps: got {value!r}, expected a small number above 0")
        return float(value)

    def sides(self, key: str) -> tuple[int, int]:
        value = self.values[key]
        pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2 or not all(isinstance(s, int) and not isinstance(s, bool) and s > 0 for s in pair):
            raise ValueError(f"{self.name}.{key}: got {value!r}, expected pixels, or [height, width] of them")
        return pair

    def image_size(self) -> int | tuple[int, int]:
        height, width = self.sides("image_size")
        return height if height == width else (height, width)

    def patch_size(self) -> int:
        height, width = self.sides("patch_size")
        if height != width:
            raise ValueError(f"{self.name}.patch_size: got {[height, width]}, expected a square")
        return height

    def sizes(self) -> dict[str, Any]:
        """Return the fields that both towers have."""
        width, hidden = self.whole("hidden_size"), self.whole("intermediate_size")
        ratio = hidden / width
        while int(width * ratio) < hidden:  # a quotient may be rounded to below the true one
            ratio = math.nextafter(ratio, math.inf)
        if width % self.whole("num_attention_heads"):
            heads = self.values["num_attention_heads"]
            raise ValueError(f"{self.name}.num_attention_heads: got {heads}, expected a divisor of {width}")
        return {
            "width": width,
            "layers": self.whole("num_hidden_layers"),
            "mlp_ratio": ratio,
            "norm_eps": self.eps(),
        }

    def vision_sizes(self) -> dict[str, Any]:
        sizes = self.sizes()
        return sizes | {
            "head_width": sizes["width"] // self.whole("num_attention_heads"),
            "patch_size": self.patch_size(),
            "approximate": self.gelu(),  # the text tower's is the model's
        }

    def text_sizes(self) -> dict[str, Any]:
        return self.sizes() | {
            "heads": self.whole("num_attention_heads"),
            "context_length": self.whole("max_position_embeddings"),
            "vocab_size": self.whole("vocab_size"),
        }
