"""The models that have a name: a row each, in the keys of :class:`~clipfast.models.config.CLIPConfig`.

Names and sizes are open_clip's. ``-quickgelu`` is the same with QuickGELU, as OpenAI's and some other weights want it;
``-tanhgelu`` is the same with the tanh GELU in both towers, as SigLIP was trained and as transformers and big_vision
compute it, where open_clip computes the erf GELU in one or both.
"""

from __future__ import annotations

import math
from typing import Any

from clipfast.models.preprocess import CLIPA, SIGLIP, SQUASHED

Row = dict[str, Any]


def rows() -> dict[str, Row]:
    """Return every name's row."""
    classic = _classic()
    worldwide = _worldwide()
    table = classic | {f"{name}-quickgelu": row | {"approximate": "quick"} for name, row in classic.items()}
    table |= worldwide | _clipa()
    for name in ("ViT-L-14-worldwide", "ViT-H-14-worldwide"):
        table[f"{name}-quickgelu"] = worldwide[name] | {"approximate": "quick"}
    siglip = _siglip()
    return table | siglip | {f"{name}-tanhgelu": _as_trained(row) for name, row in siglip.items()} | _naflex()


# image towers: (width, layers, width of a head, MLP's width over it)
_BASE, _LARGE, _HUGE = (768, 12, 64, 4.0), (1024, 24, 64, 4.0), (1280, 32, 80, 4.0)
_BIG_G, _SO400M, _GIANT_OPT = (1664, 48, 104, 4.9231), (1152, 27, 72, 3.7362), (1536, 40, 96, 4.0)


def _vision(sizes: tuple[int, int, int, float], patch: int, pixels: int, **more: Any) -> Row:
    width, layers, head, ratio = sizes
    return {
        "image_size": pixels, "layers": layers, "width": width, "head_width": head, "mlp_ratio": ratio,
        "patch_size": patch, **more,
    }  # fmt: skip


def _text(width: int, heads: int, layers: int = 12, **more: Any) -> Row:
    return {"width": width, "heads": heads, "layers": layers, **more}


def _row(embed_dim: int, vision: Row, text: Row, **more: Any) -> Row:
    return {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text, **more}


def _classic() -> dict[str, Row]:
    """Radford et al. (2021), table 20; H/14 and bigG/14 from LAION-2B's OpenCLIP models."""

    def resnet(embed: int, width: int, layers: tuple[int, ...], pixels: int, text: Row) -> Row:
        return _row(embed, {"image_size": pixels, "layers": layers, "width": width, "patch_size": None}, text)

    return {
        "ViT-B-32": _row(512, _vision(_BASE, 32, 224), _text(512, 8)),
        "ViT-B-16": _row(512, _vision(_BASE, 16, 224), _text(512, 8)),
        "ViT-L-14": _row(768, _vision(_LARGE, 14, 224), _text(768, 12)),
        "ViT-L-14-336": _row(768, _vision(_LARGE, 14, 336), _text(768, 12)),
        "ViT-H-14": _row(1024, _vision(_HUGE, 14, 224), _text(1024, 16, 24)),
        "ViT-bigG-14": _row(1280, _vision(_BIG_G, 14, 224), _text(1280, 20, 32)),
        "RN50": resnet(1024, 64, (3, 4, 6, 3), 224, _text(512, 8)),
        "RN101": resnet(512, 64, (3, 4, 23, 3), 224, _text(512, 8)),
        "RN50x4": resnet(640, 80, (4, 6, 10, 6), 288, _text(640, 10)),
        "RN50x16": resnet(768, 96, (6, 8, 18, 8), 384, _text(768, 12)),
        "RN50x64": resnet(1024, 128, (3, 15, 36, 10), 448, _text(1024, 16)),
    }


def _worldwide() -> dict[str, Row]:
    """MetaCLIP 2 (Chuang et al., 2025): CLIP with the vocabularies of mT5 and XLM-V."""
    mt5 = {"vocab_size": 250_100, "eos_id": 1}
    xlm = {"vocab_size": 901_629, "eos_id": 2}
    huge, big = _text(1024, 16, 24, **xlm), _text(1280, 20, 32, **xlm)
    return {
        "ViT-L-14-worldwide": _row(768, _vision(_LARGE, 14, 224), _text(768, 12, **mt5)),
        "ViT-H-14-worldwide": _row(1024, _vision(_HUGE, 14, 224), huge),
        "ViT-H-14-worldwide-378": _row(1024, _vision(_HUGE, 14, 378, preprocess_cfg=SQUASHED), huge),
        "ViT-bigG-14-worldwide": _row(1280, _vision(_BIG_G, 14, 224), big),
        "ViT-bigG-14-worldwide-378": _row(1280, _vision(_BIG_G, 14, 378, preprocess_cfg=SQUASHED), big),
    }


def _clipa() -> dict[str, Row]:
    """CLIPA (Li et al., 2023): the mean of the patches, and BERT's vocabulary read at the last of 32 tokens."""
    pooled = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "preprocess_cfg": CLIPA}
    short = {"context_length": 32, "vocab_size": 32_000, "pool_type": "last", "no_causal_mask": True}
    kinds = {
        "L": (768, _LARGE, _text(768, 12, **short)),
        "H": (1024, _HUGE, _text(1024, 16, 24, **short)),
        "bigG": (1280, _BIG_G, _text(1280, 20, 32, **short)),
    }
    return {
        f"ViT-{kind}-14-CLIPA{suffix}": _row(embed, _vision(sizes, 14, pixels, **pooled), text)
        for kind, (embed, sizes, text) in kinds.items()
        for suffix, pixels in (("", 224), ("-336", 336))
    }


# v1's vocabulary, the multilingual one, and v2's (Gemma's)
_ENGLISH, _I18N, _GEMMA = 32_000, 250_000, 256_000

# kind: (image tower, text tower)
_SIGLIP_SIZES = {
    "B": (_BASE, _text(768, 12)),
    "L": (_LARGE, _text(1024, 16, 24)),
    "SO400M": (_SO400M, _text(1152, 16, 27, mlp_ratio=3.7362)),
    "gopt": (_GIANT_OPT, _text(1152, 16, 27, mlp_ratio=3.7362)),
}

# (kind, patch, name, vocabulary, {suffix: pixels})
_SIGLIP_NAMES: tuple[tuple[str, int, str, int, dict[str, int]], ...] = (
    ("B", 16, "SigLIP", _ENGLISH, {"": 224, "-256": 256, "-384": 384, "-512": 512}),
    ("B", 16, "SigLIP-i18n", _I18N, {"-256": 256}),
    ("L", 16, "SigLIP", _ENGLISH, {"-256": 256, "-384": 384}),
    ("SO400M", 14, "SigLIP", _ENGLISH, {"": 224, "-378": 378, "-384": 384}),
    ("SO400M", 16, "SigLIP-i18n", _I18N, {"-256": 256}),
    ("B", 32, "SigLIP2", _GEMMA, {"-256": 256}),
    ("B", 16, "SigLIP2", _GEMMA, {"": 224, "-256": 256, "-384": 384, "-512": 512}),
    ("L", 16, "SigLIP2", _GEMMA, {"-256": 256, "-384": 384, "-512": 512}),
    ("SO400M", 14, "SigLIP2", _GEMMA, {"": 224, "-378": 378}),
    ("SO400M", 16, "SigLIP2", _GEMMA, {"-256": 256, "-384": 384, "-512": 512}),
    ("gopt", 16, "SigLIP2", _GEMMA, {"-256": 256, "-384": 384}),
)

# what every image tower and every text tower of SigLIP has
SIGLIP_VISION: Row = {
    "pool_type": "map", "class_token": False, "no_ln_pre": True, "patch_bias": True, "norm_eps": 1e-6,
    "proj_type": "none", "preprocess_cfg": SIGLIP,
}  # fmt: skip
SIGLIP_TEXT: Row = {
    "context_length": 64, "pool_type": "last", "no_causal_mask": True, "proj_bias": True, "norm_eps": 1e-6,
}  # fmt: skip


def _siglip_row(kind: str, patch: int, vocabulary: int, pixels: int, **more: Any) -> Row:
    sizes, text = _SIGLIP_SIZES[kind]
    # open_clip's image tower is timm's, where these have the tanh GELU
    tanh = kind == "gopt" or (kind, patch) in (("B", 32), ("SO400M", 16))
    vision = _vision(sizes, patch, pixels, **SIGLIP_VISION, approximate="tanh" if tanh else "none")
    text = text | SIGLIP_TEXT | {"vocab_size": vocabulary} | ({"approximate": "tanh"} if vocabulary == _GEMMA else {})
    return _row(sizes[0], vision, text | more, init_logit_bias=-10.0)


def _siglip() -> dict[str, Row]:
    """SigLIP (Zhai et al., 2023) and SigLIP 2 (Tschannen et al., 2025)."""
    table = {
        f"ViT-{kind}-{patch}-{name}{suffix}": _siglip_row(kind, patch, vocabulary, pixels)
        for kind, patch, name, vocabulary, sizes in _SIGLIP_NAMES
        for suffix, pixels in sizes.items()
    }
    table["ViT-SO400M-14-SigLIP"] = _siglip_row("SO400M", 14, _ENGLISH, 224, context_length=16)
    table["ViT-SO400M-16-SigLIP-i18n-256"] = _siglip_row("SO400M", 16, _I18N, 256, proj_bias=False, proj_type="none")
    return table


def _as_trained(row: Row) -> Row:
    """Return a row with SigLIP's own GELU and where its logits start, ``10 · cos − 10``."""
    vision, text = (row[part] | {"approximate": "tanh"} for part in ("vision_cfg", "text_cfg"))
    return row | {"vision_cfg": vision, "text_cfg": text, "init_logit_scale": math.log(10)}


def _naflex() -> dict[str, Row]:
    """SigLIP 2 for images of any aspect: a table of 16 x 16 positions, which is resampled."""
    table = {}
    for kind in ("B", "SO400M"):
        row = _as_trained(_siglip_row(kind, 16, _GEMMA, 256))
        table[f"ViT-{kind}-16-SigLIP2-NaFlex"] = row | {"vision_cfg": row["vision_cfg"] | {"naflex": True}}
    return table
