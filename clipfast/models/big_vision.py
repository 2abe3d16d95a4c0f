"""big_vision's names and shapes of SigLIP's weights (flax parameters in an .npz), and the way to and from OpenAI's.

Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023); Tschannen et al., "SigLIP 2" (2025).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from clipfast.models.key_renaming import State, transposed

_ROOT = "params/"
# what training checkpoints hold beside the parameters
_NOT_PARAMETERS = ("opt/", "extra/")

_ATTENTION = "MultiHeadDotProductAttention_0/"
# stands in a name for each of the projections that OpenAI's layout packs
_PACKED = "{}"
_PROJECTIONS = ("query", "key", "value")
_SHARED = {
    "attn.in_proj_weight": f"{_ATTENTION}{_PACKED}/kernel",
    "attn.in_proj_bias": f"{_ATTENTION}{_PACKED}/bias",
    "mlp.c_fc.weight": "MlpBlock_0/Dense_0/kernel",
    "mlp.c_fc.bias": "MlpBlock_0/Dense_0/bias",
    "mlp.c_proj.weight": "MlpBlock_0/Dense_1/kernel",
    "mlp.c_proj.bias": "MlpBlock_0/Dense_1/bias",
    "attn.out_proj.weight": _ATTENTION + "out/kernel",
    "attn.out_proj.bias": _ATTENTION + "out/bias",
}
_IN_BLOCK = _SHARED | {
    "ln_1.weight": "LayerNorm_0/scale",
    "ln_1.bias": "LayerNorm_0/bias",
    "ln_2.weight": "LayerNorm_1/scale",
    "ln_2.bias": "LayerNorm_1/bias",
}
_IN_POOL = _SHARED | {"probe": "probe", "ln.weight": "LayerNorm_0/scale", "ln.bias": "LayerNorm_0/bias"}
_NAMES = {
    "visual.conv1.weight": "img/embedding/kernel",
    "visual.conv1.bias": "img/embedding/bias",
    "visual.positional_embedding": "img/pos_embedding",
    "visual.ln_post.weight": "img/Transformer/encoder_norm/scale",
    "visual.ln_post.bias": "img/Transformer/encoder_norm/bias",
    "token_embedding.weight": "txt/Embed_0/embedding",
    "positional_embedding": "txt/pos_embedding",
    "ln_final.weight": "txt/Encoder_0/encoder_norm/scale",
    "ln_final.bias": "txt/Encoder_0/encoder_norm/bias",
    "text_projection.weight": "txt/head/kernel",
    "text_projection.bias": "txt/head/bias",
    "logit_scale": "t",
    "logit_bias": "b",
}
# beginnings of keys, OpenAI's and big_vision's
_BLOCKS = {
    "visual.transformer.resblocks.": "img/Transformer/encoderblock_",
    "transformer.resblocks.": "txt/Encoder_0/encoderblock_",
}
_POOL = ("visual.attn_pool.", "img/MAPHead_0/")

# big_vision's variants of a ViT: heads by width (Ti, S, M, B, L, So400m, H, g, g-opt, G, e)
_HEADS = {192: 3, 384: 6, 512: 8, 768: 12} | dict.fromkeys((1024, 1152, 1280, 1408, 1536, 1664, 1792), 16)


def is_big_vision(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict has big_vision's names of an image or a text tower."""
    starts = ("img/embedding/", "img/Transformer/", "txt/Embed_0/", "txt/Encoder_0/")
    return any(key.removeprefix(_ROOT).startswith(starts) for key in state)


def heads_of(state: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    """Return the heads of image and text tower by the shapes of big_vision's biases; None where there are none."""
    found: list[int | None] = []
    for tower in ("img/", "txt/"):
        biases = [v for k, v in state.items() if k.removeprefix(_ROOT).startswith(tower) and k.endswith("/query/bias")]
        found.append(biases[0].shape[-2] if biases and biases[0].dim() > 1 else None)
    return found[0], found[1]


def grid_of(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the grid of big_vision's image positions; None where there are none, or neither grid nor square."""
    positions = state.get(_ROOT + "img/pos_embedding", state.get("img/pos_embedding"))
    if positions is None or positions.dim() != 3:
        return None
    if positions.shape[0] != 1:
        return positions.shape[0], positions.shape[1]
    side = math.isqrt(positions.shape[1])
    return (side, side) if side * side == positions.shape[1] else None


def from_big_vision(state: Mapping[str, Tensor]) -> State:
    """Return big_vision's weights under OpenAI's keys and in its shapes; names that are not known stay.

    Blocks may come one by one (``encoderblock_0``) or stacked with a leading dimension of layers (``encoderblock``).

    Raises:
        ValueError: Two keys become one, or parts of a QKV projection are missing or differ.
    """
    named = {k.removeprefix(_ROOT): v for k, v in state.items() if not k.startswith(_NOT_PARAMETERS)}
    unstacked: State = {}
    for key, value in named.items():
        before, stacked, after = key.partition("/encoderblock/")
        layers = range(value.shape[0]) if stacked and value.dim() else ()
        rows = {f"{before}/encoderblock_{i}/{after}": value[i] for i in layers} if stacked else {key: value}
        for name, row in rows.items():
            if name in unstacked:
                raise ValueError(f"state dict: got two arrays for {name}, expected one: {key} is the second")
            unstacked[name] = row
    converted: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in unstacked.items():
        found = re.fullmatch(rf"(.*{_ATTENTION})(query|key|value)(/.*)", key)
        name = _own_name(f"{found[1]}{_PACKED}{found[3]}" if found else key)
        if found and name:
            parts.setdefault(name, {})[found[2]] = value
        else:
            converted[name or key] = _own_shape(name, value) if name else value
    return converted | {name: _join(name, values) for name, values in parts.items()}


def to_big_vision(
    state: Mapping[str, Tensor],
    heads: tuple[int | None, int | None] = (None, None),
    naflex: bool = False,
    grid: tuple[int, int] | None = None,
) -> tuple[State, list[str]]:
    """Return weights of OpenAI's keys under big_vision's names, block by block, and the keys that have no place there.

    Args:
        state: Keys and shapes of OpenAI's layout; of NaFlex's patches, ``visual.conv1.weight`` is a matrix.
        heads: The heads of image and text tower; None is those of big_vision's variant of the tower's width.
        naflex: Whether image positions lie in a grid, as NaFlex has them.
        grid: NaFlex's grid of positions; None is a square.

    Raises:
        ValueError: Heads that are not known or do not divide the width, or positions that do not fill the grid.
    """
    homeless = [key for key in state if _flax_name(key) is None]
    if homeless:
        return {}, homeless
    converted: State = {}
    for key, value in state.items():
        name = _ROOT + str(_flax_name(key))
        number = heads[0] if key.startswith("visual.") else heads[1]
        if _PACKED in name:
            for part, values in zip(_PROJECTIONS, _by_head(key, value, number), strict=True):
                converted[name.replace(_PACKED, part)] = values
        else:
            converted[name] = _flax_shape(key, value, number, naflex, grid)
    return converted, []


def _flax_name(key: str) -> str | None:
    """Return big_vision's name for a key of OpenAI's; None where it has none."""
    for own, flax in _BLOCKS.items():
        if found := re.fullmatch(rf"{re.escape(own)}(\d+)\.(.+)", key):
            name = _IN_BLOCK.get(found[2])
            return name and f"{flax}{found[1]}/{name}"
    if key.startswith(_POOL[0]):
        name = _IN_POOL.get(key.removeprefix(_POOL[0]))
        return name and _POOL[1] + name
    return _NAMES.get(key)


def _own_name(key: str) -> str | None:
    """Return OpenAI's key for a name of big_vision's; None where it has none."""
    for own, flax in _BLOCKS.items():
        if found := re.fullmatch(rf"{flax}(\d+)/(.+)", key):
            name = _inverted(_IN_BLOCK).get(found[2])
            return name and f"{own}{found[1]}.{name}"
    if key.startswith(_POOL[1]):
        name = _inverted(_IN_POOL).get(key.removeprefix(_POOL[1]))
        return name and _POOL[0] + name
    return _inverted(_NAMES).get(key)


def _inverted(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}


def _own_shape(key: str, value: Tensor) -> Tensor:
    """Return a tensor in OpenAI's shape; one of an unexpected shape stays and is refused by whoever knows the model."""
    if key in ("logit_scale", "logit_bias"):
        return value.reshape(()) if value.numel() == 1 else value
    if key == "visual.conv1.weight":
        return value.permute(3, 2, 0, 1) if value.dim() == 4 else transposed(value)
    if key.endswith("positional_embedding"):
        return value.flatten(0, 1) if value.dim() == 3 else value
    if key.endswith("probe"):
        return value.reshape(-1) if value.dim() == 3 and value.numel() == value.shape[-1] else value
    if key.endswith("attn.out_proj.weight"):
        return value.flatten(0, 1).T if value.dim() == 3 else value
    if key.endswith(".weight") and key != "token_embedding.weight":
        return transposed(value)
    return value


def _flax_shape(key: str, value: Tensor, heads: int | None, naflex: bool, grid: tuple[int, int] | None) -> Tensor:
    if key in ("logit_scale", "logit_bias"):
        return value.reshape(1)
    if key == "visual.conv1.weight":
        return value.permute(2, 3, 1, 0) if value.dim() == 4 else transposed(value)
    if key == "visual.positional_embedding" and naflex:
        side = math.isqrt(value.shape[0])
        rows, columns = grid or (side, side)
        if rows * columns != value.shape[0]:
            raise ValueError(f"{key}: got {value.shape[0]} rows, expected {rows}·{columns} for NaFlex's grid")
        return value.unflatten(0, (rows, columns))
    if key.endswith("positional_embedding"):
        return value[None]
    if key.endswith("probe"):
        return value.reshape(1, 1, -1)
    if key.endswith("attn.out_proj.weight"):
        return value.T.unflatten(0, (_heads(key, value.shape[1], heads), -1))
    if key.endswith(".weight") and key != "token_embedding.weight":
        return transposed(value)
    return value


def _heads(key: str, width: int, heads: int | None) -> int:
    heads = heads or _HEADS.get(width)
    if heads is None:
        raise ValueError(
            f"heads: got none for {key} of width {width}, expected (image, text): weights alone do not tell, and "
            f"big_vision has no variant of this width"
        )
    if width % heads:
        raise ValueError(f"heads: got {heads} for {key}, expected a divisor of the width {width}")
    return heads


def _by_head(key: str, value: Tensor, heads: int | None) -> list[Tensor]:
    """Part a packed projection: three kernels ``[W, H, D]``, or three biases ``[H, D]``."""
    if value.dim() not in (1, 2) or value.shape[0] % 3:
        raise ValueError(f"{key}: got shape {tuple(value.shape)}, expected 3 equal parts in the first dimension")
    sizes = (_heads(key, value.shape[0] // 3, heads), -1)
    return [part.T.unflatten(-1, sizes) if part.dim() == 2 else part.unflatten(0, sizes) for part in value.chunk(3)]


def _join(key: str, values: Mapping[str, Tensor]) -> Tensor:
    """Join three kernels ``[W, H, D]`` to ``[3·H·D, W]``, or three biases ``[H, D]`` to ``[3·H·D]``."""
    kinds = {part: (tuple(values[part].shape), values[part].dtype) if part in values else None for part in _PROJECTIONS}
    dims = 3 if key.endswith("weight") else 2
    if None in kinds.values() or len(set(kinds.values())) > 1 or values["query"].dim() != dims:
        came = ", ".join(f"{part} {kind or 'missing'}" for part, kind in kinds.items())
        raise ValueError(f"state dict: got {came} for {key}, expected all of one shape with {dims} sizes and one dtype")
    rows = [values[part].flatten(-2) for part in _PROJECTIONS]
    return torch.cat([row.T for row in rows] if dims == 3 else rows)
