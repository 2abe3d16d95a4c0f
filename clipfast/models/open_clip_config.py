"""open_clip's configuration files in the keys of :class:`~clipfast.models.config.CLIPConfig`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from clipfast.models.named import SIGLIP_VISION

# what chooses a tokenizer or says where weights come from: not the model's sizes
_IGNORED = {
    "": ("custom_text",),
    "vision_cfg.": ("timm_model_pretrained", "output_tokens"),
    "text_cfg.": ("hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode", "hf_model_pretrained", "output_tokens"),
}

# what is not served, and how it is off; pad_id counts only where there is a class token of text
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "attentional_pool",
            "qk_norm",
            "scaled_cosine_attn",
            "scale_heads",
            "scale_attn_inner",
            "scale_attn",
            "scale_fc",
        ),
        (False, None),
    ),
    "embed_cls": (False,),
    "block_type": (None, "default"),
    "pos_embed_type": ("learnable",),
    "timm_proj_bias": (False,),
    "timm_drop": (0, 0.0),
    "timm_drop_path": (None, 0, 0.0),
    "hf_model_name": (None, ""),
}
_WITHOUT_THEM = ("attn_pooler_queries", "attn_pooler_heads", "pad_id", "hf_proj_type", "hf_pooler_type")

# timm's image towers of SigLIP: (width, layers, width of a head, MLP's width over it)
_TIMM_SIZES = {
    "base": (768, 12, 64, 4.0),
    "large": (1024, 24, 64, 4.0),
    "so400m": (1152, 27, 72, 3.7362),
    "giantopt": (1536, 40, 96, 4.0),
}
_TIMM_NAME = re.compile(r"vit_(base|large|so400m|giantopt)_patch(\d+)_siglip(_gap)?_(\d+)(\.\w+)?")
# those that timm gives the tanh GELU
_TIMM_TANH = {("base", 32), ("so400m", 16), ("giantopt", 16)}


def of_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration in a file: open_clip's on model hubs hold sizes and ``preprocess_cfg`` apart."""
    found = dict(values.get("model_cfg", values))
    return found | {name: values[name] for name in ("preprocess_cfg",) if name in values}


def translated(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with open_clip's own keys replaced; others stay as they are.

    Args:
        values: Keys of :class:`~clipfast.models.config.CLIPConfig`, of open_clip's files, or both.

    Raises:
        ValueError: A key asks for what is not served: the message names it.
    """
    values = _without(dict(values), "")
    if (preprocess := values.pop("preprocess_cfg", None)) is not None:
        vision = values.get("vision_cfg") or {}
        if not isinstance(vision, Mapping):
            raise ValueError("configuration key: got 'preprocess_cfg' beside a VisionConfig, expected it in that")
        values["vision_cfg"] = {**vision, "preprocess_cfg": preprocess}
    if values.pop("quick_gelu", False):
        values.setdefault("approximate", "quick")
    for part in ("vision_cfg", "text_cfg"):
        if isinstance(values.get(part), Mapping):
            values[part] = _tower(dict(values[part]), part + ".")
    return values


def _tower(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    values = _without(values, prefix)
    for name, inner, ours in (("norm_kwargs", "eps", "norm_eps"), ("act_kwargs", "approximate", "approximate")):
        kwargs = values.pop(name, None) or {}
        if not isinstance(kwargs, Mapping) or set(kwargs) - {inner}:
            raise ValueError(f"configuration key {prefix + name!r}: got {kwargs!r}, expected {{{inner!r}: …}}")
        if inner in kwargs:
            values[ours] = kwargs[inner]
    if values.get("timm_model_name"):
        return _of_timm(values, prefix)
    for name in ("timm_model_name", "timm_pool", "timm_proj"):
        values.pop(name, None)
    return values


def _without(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Return values without what is ignored, and without what is off."""
    for name in _IGNORED[prefix]:
        values.pop(name, None)
    if not prefix:
        return values
    for name, off in _OFF.items():
        if name in values and values.pop(name) not in off:
            raise ValueError(
                f"configuration key: got {prefix + name!r}, which is not served, expected {off[0]!r} or no such key"
            )
    for name in _WITHOUT_THEM:
        values.pop(name, None)
    return values


def _of_timm(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    name = values.pop("timm_model_name")
    match = _TIMM_NAME.fullmatch(name)
    if match is None:
        raise ValueError(
            f"configuration key: got {prefix}timm_model_name = {name!r}, expected one of timm's image towers of "
            f"SigLIP, such as 'vit_base_patch16_siglip_256'"
        )
    kind, patch, is_mean, pixels = match[1], int(match[2]), bool(match[3]), int(match[4])
    pool, projection = values.pop("timm_pool", "avg"), values.pop("timm_proj", "linear") or "none"
    for key, came, expected in (
        ("timm_pool", pool, ("avg" if is_mean else "map",)),
        ("timm_proj", projection, ("none", "linear")),
    ):
        if came not in expected:
            raise ValueError(f"configuration key: got {prefix}{key} = {came!r} with {name}, expected one of {expected}")
    width, layers, head, ratio = _TIMM_SIZES[kind]
    sizes = {"image_size": pixels, "layers": layers, "width": width, "head_width": head, "mlp_ratio": ratio}
    gelu = "tanh" if (kind, patch) in _TIMM_TANH else "none"
    row = SIGLIP_VISION | sizes | {"patch_size": patch, "pool_type": pool, "proj_type": projection, "approximate": gelu}
    return row | values
