"""The key layouts that CLIP weights come in, and the ways between them.

OpenAI's layout, with names for what its towers did not have, is this project's own; the others are described by how
they rename it. All of them hold the same numbers, so a way there and back is bitwise.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from clipfast.models.big_vision import from_big_vision, is_big_vision, to_big_vision
from clipfast.models.big_vision import grid_of as big_vision_grid_of
from clipfast.models.key_renaming import State, renamed_from, renamed_to, transposed
from clipfast.models.key_tables import OF_TRANSFORMERS_CLIP, OF_TRANSFORMERS_SIGLIP, TIMM, TRANSFORMERS, lacked_by
from clipfast.models.long_clip import with_one_table
from clipfast.models.misfits import listed
from clipfast.models.wrappers import without_prefixes

LAYOUTS = ("openai", "open_clip", "transformers", "timm", "big_vision")
# those that embed NaFlex's patches by a matrix
NAFLEX_LAYOUTS = ("transformers", "timm", "big_vision")

_OPENAI_KEY = re.compile(
    r"""logit_(scale|bias) | positional_embedding | text_projection(\.(weight|bias))? | token_embedding\.weight
    | ln_final\.(weight|bias)
    | visual\.(class_embedding | reg_tokens | positional_embedding | proj | conv1\.(weight|bias)
        | ln_(pre|post)\.(weight|bias))
    | (visual\.)?transformer\.resblocks\.\d+\.
        (attn\.in_proj_(weight|bias) | (ln_[12] | attn\.out_proj | mlp\.c_(fc|proj))\.(weight|bias) | ls_[12]\.gamma)
    | visual\.attn_pool\.
        (probe | attn\.in_proj_(weight|bias) | (attn\.out_proj | ln | mlp\.c_(fc|proj))\.(weight|bias))
    | visual\.(layer[1-4]\.\d+\.)?
        (conv[123]\.weight | (bn[123] | downsample\.[01])\.(weight|bias|running_(mean|var)|num_batches_tracked))
    | visual\.attnpool\.(positional_embedding | [qkvc]_proj\.(weight|bias))""",
    re.VERBOSE,
)
# the beginnings of one tower's keys, those of other layouts too, for keys that found no name in OpenAI's
_IMAGE_KEYS = ("visual.", "vision_model.", "img/")
_TEXT_KEYS = (
    "positional_embedding",
    "text_projection",
    "token_embedding.",
    "transformer.",
    "ln_final.",
    "text.",
    "text_model.",
    "txt/",
)
_KEYS_OF_BOTH = ("logit_scale", "logit_bias")
# what transformers' image classifiers put beside a tower
_CLASSIFIER = "classifier."

# what OpenAI's archives hold beside weights, and masks that older open_clip and transformers kept in the state dict
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_NOT_WEIGHTS = re.compile(r"(^|\.)(attn_mask|position_ids)$")

# open_clip keeps an image tower of timm's as a trunk, and its projection, if there is one, behind it
_TRUNK, _TRUNK_PROJECTION = "visual.trunk.", "visual.head.proj.weight"
# timm's name of a last norm behind the pooling
_AFTER_POOL = "fc_norm."
# timm's NaFlexVit names what comes before the blocks otherwise than its ViT
_NAFLEX_VIT = {"embeds.proj.": "patch_embed.proj.", "embeds.pos_embed": "pos_embed"}


def detect_layout(state: Mapping[str, Tensor]) -> str:
    """Tell a state dict's layout by its keys: one of :data:`LAYOUTS`.

    ``"open_clip"`` is told from ``"openai"`` where the image tower is timm's.

    Raises:
        ValueError: The keys are of none of them.
    """
    if is_big_vision(state):
        return "big_vision"
    if any(k.startswith(("vision_model.", "text_model.", "embeddings.", "encoder.layers.")) for k in state):
        return "transformers"
    if any(k.startswith((_TRUNK, "trunk.")) for k in state):
        return "open_clip"
    if "cls_token" in state or "patch_embed.proj.weight" in state or "embeds.proj.weight" in state:
        return "timm"
    if any(k.startswith(("visual.", "transformer.resblocks.", "text.transformer.", "layer1.0.")) for k in state):
        return "openai"
    raise ValueError(
        f"state dict: got keys of no known layout ({listed(list(state))}), expected those of {', '.join(LAYOUTS)}"
    )


def is_from_openai(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict is OpenAI's own, by the sizes that only OpenAI's archives hold."""
    return all(name in state for name in _OPENAI_SIZES)


def is_naflex(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict of another library is a NaFlex model's: it embeds patches by a matrix."""
    ends = ("embeddings.patch_embedding.weight", "img/embedding/kernel", "embeds.proj.weight")
    return any(value.dim() == 2 and key.endswith(ends) for key, value in state.items())


def is_norm_after_pool(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict is timm's with its last norm behind the pooling."""
    return any(key.endswith(f"{_AFTER_POOL}weight") for key in state)


def grid_of(state: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """Return the grid of image positions that the shapes of big_vision and of timm's NaFlexVit tell; None of others."""
    for key, value in state.items():
        if key.endswith("embeds.pos_embed") and value.dim() == 4:
            return value.shape[1], value.shape[2]
    return big_vision_grid_of(state)


def check_layout(layout: str) -> None:
    """Raise ValueError unless ``layout`` is one of :data:`LAYOUTS`."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")


def to_openai(state: Mapping[str, Tensor]) -> State:
    """Bring a state dict of any layout into OpenAI's; image towers get the prefix ``visual.``.

    Prefixes of wrappers (:func:`~clipfast.models.wrappers.without_prefixes`), OpenAI's sizes and buffers that are no
    weights are left out, and Long-CLIP's two tables of positions become one. Tensors are views of those that came, or
    joined from them. Keys that CLIP has no place for keep their names.

    Raises:
        ValueError: Keys of no known layout or under several prefixes, a projection bias that CLIP has no place for, or
            parts of a QKV projection that are missing or differ in shape or dtype.
    """
    state = {k: v for k, v in without_prefixes(state).items() if not _NOT_WEIGHTS.search(k)}
    state = with_one_table(state)
    layout = detect_layout(state)
    if layout == "openai":
        return _normalised_openai(state)
    if layout == "open_clip":
        return _from_trunk(state)
    if layout == "timm":
        return _with_kernel(_from_timm(state))
    if layout == "big_vision":
        return _with_kernel(from_big_vision(state))
    state = renamed_from(_with_tower_prefix(state), TRANSFORMERS)
    for key in _KEYS_OF_BOTH:  # one number each, which its SigLIP classes keep in a vector
        if key in state and state[key].shape == (1,):
            state[key] = state[key][0]
    return _with_kernel(state)


def from_openai(
    state: Mapping[str, Tensor],
    layout: str,
    *,
    naflex: bool = False,
    heads: tuple[int | None, int | None] = (None, None),
    grid: tuple[int, int] | None = None,
    norm_after_pool: bool = False,
) -> State:
    """Bring a state dict of OpenAI's layout into another.

    Args:
        state: Keys as of :func:`to_openai`.
        layout: - ``"openai"``: this project's own.
            - ``"open_clip"``: the same, but for towers that open_clip takes from timm: those without a class token,
              which get the prefix ``visual.trunk.``, and the text tower beside them ``text.``.
            - ``"transformers"``: a whole model or one tower of it, with the prefixes that a whole model's keys have. A
              SigLIP whose text tower does not project gets the identity, as in transformers' own conversions.
            - ``"timm"``: an image tower, whose projection gets a bias of zeros as in timm's own conversions.
            - ``"big_vision"``: SigLIP's parameters, block by block.
        naflex: Whether it is to be a NaFlex model's there, which embeds patches by a matrix.
        heads: The heads of image and text tower, for ``"big_vision"``: None is its variant's of the tower's width.
        grid: NaFlex's grid of positions, for ``"timm"`` and ``"big_vision"``; None is a square.
        norm_after_pool: Whether the last norm of ``"timm"`` stands behind the pooling, where its name is ``fc_norm``.

    Returns:
        Contiguous tensors, views of those that came where they can be.

    Raises:
        ValueError: ``layout`` is none of these, has no place for one of the keys or always has one that is missing, a
            QKV projection is not three of equal size, or heads are needed or wrong.
    """
    check_layout(layout)
    if naflex and layout not in NAFLEX_LAYOUTS:
        raise ValueError(f"naflex: got True with layout {layout!r}, expected one of {', '.join(NAFLEX_LAYOUTS)}")
    kernel = state.get("visual.conv1.weight")
    if naflex and kernel is not None and kernel.dim() == 4:  # to (row, column, channel)
        state = {**state, "visual.conv1.weight": kernel.permute(0, 2, 3, 1).flatten(1)}
    if layout == "openai":
        converted, homeless = dict(state), [k for k in state if not _OPENAI_KEY.fullmatch(k)]
    elif layout == "open_clip":
        converted, homeless = _to_open_clip(state)
    elif layout == "big_vision":
        converted, homeless = to_big_vision(state, heads, naflex, grid)
    elif layout == "timm":
        converted, homeless = renamed_to(state, TIMM)
        if norm_after_pool:
            converted = {_AFTER_POOL + k[5:] if k.startswith("norm.") else k: v for k, v in converted.items()}
        converted = _of_naflex_vit(converted, grid) if naflex else converted
    else:
        converted, homeless = _to_transformers(state)
    if homeless:
        raise ValueError(f"layout {layout!r}: got keys that it has no place for: {listed(homeless)}")
    if lacked := lacked_by(layout, state):
        raise ValueError(f"layout {layout!r}: got no {listed(lacked)}, expected what its models always have")
    if layout == "timm" and "head.weight" in converted:
        converted["head.bias"] = converted["head.weight"].new_zeros(converted["head.weight"].shape[0])
    return {k: v.contiguous() for k, v in converted.items()}


def image_tower_of(state: Mapping[str, Tensor]) -> State:
    """Return the image tower's share of weights in OpenAI's layout, and whatever is of no known place.

    The linear layer of transformers' image classifiers is no part of a tower.
    """
    return {k: v for k, v in state.items() if not k.startswith((*_TEXT_KEYS, *_KEYS_OF_BOTH, _CLASSIFIER))}


def text_tower_of(state: Mapping[str, Tensor]) -> State:
    """Return the text tower's share of weights in OpenAI's layout, and whatever is of no known place."""
    return {k: v for k, v in state.items() if not k.startswith(_IMAGE_KEYS + _KEYS_OF_BOTH)}


def towers_of(state: Mapping[str, Tensor]) -> set[str]:
    """Return which towers weights in OpenAI's layout hold: ``"image"``, ``"text"``, both or none."""
    towers = {"image": _IMAGE_KEYS, "text": _TEXT_KEYS}
    return {tower for tower, beginnings in towers.items() if any(key.startswith(beginnings) for key in state)}


def is_classifier(state: Mapping[str, Tensor]) -> bool:
    """Tell whether weights are those of transformers' image classifiers."""
    return any(key.startswith(_CLASSIFIER) for key in state)


def _to_transformers(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    """Rename for transformers, whose classes are of CLIP's family or of SigLIP's: no key may be of the other."""
    converted, homeless = renamed_to(state, TRANSFORMERS)
    of_clip = any(k.startswith(OF_TRANSFORMERS_CLIP) or k == "text_projection" for k in state)
    if of_clip:
        homeless += [k for k in state if k.startswith(OF_TRANSFORMERS_SIGLIP)]
        return converted, homeless
    if "logit_bias" in state:
        converted |= {k: v.reshape(1) for k, v in converted.items() if k in _KEYS_OF_BOTH}
    norm = state.get("ln_final.weight")
    of_siglip = any(k.startswith(OF_TRANSFORMERS_SIGLIP) for k in state)
    if of_siglip and norm is not None and "text_projection.weight" not in state:
        converted["text_model.head.weight"] = torch.eye(norm.numel(), dtype=norm.dtype, device=norm.device)
        converted["text_model.head.bias"] = torch.zeros_like(norm)
    return converted, homeless


def _to_open_clip(state: Mapping[str, Tensor]) -> tuple[State, list[str]]:
    homeless = [k for k in state if not _OPENAI_KEY.fullmatch(k)]
    image = image_tower_of(state)
    # its own ViT has a class token always; its ResNets have an attnpool
    trunk = "visual.conv1.weight" in image and not {"visual.class_embedding", "visual.bn1.weight"} & image.keys()
    # a text tower alone has the prefix that it has beside such a trunk only if it projects as SigLIP's does
    if not trunk and (image or "text_projection.weight" not in state):
        return dict(state), homeless
    projection = image.pop("visual.proj", None)
    named, unnamed = renamed_to(image, TIMM)
    converted = {_TRUNK + k: v for k, v in named.items()}
    if projection is not None:
        converted[_TRUNK_PROJECTION] = transposed(projection)
    converted |= {f"text.{k}": v for k, v in text_tower_of(state).items()}
    return converted | {k: state[k] for k in _KEYS_OF_BOTH if k in state}, homeless or unnamed


def _from_trunk(state: State) -> State:
    """Take an open_clip model, or its image tower alone, whose image tower is timm's."""
    if not any(k.startswith(_TRUNK) for k in state):
        state = {f"visual.{k}": v for k, v in state.items()}
    trunk = {k.removeprefix(_TRUNK): v for k, v in state.items() if k.startswith(_TRUNK)}
    rest = {k.removeprefix("text."): v for k, v in state.items() if not k.startswith(_TRUNK)}
    converted = _with_kernel(_from_timm(trunk)) | rest
    if _TRUNK_PROJECTION in converted:
        if "visual.proj" in converted:
            raise ValueError(f"state dict: got a projection in {_TRUNK}head and {_TRUNK_PROJECTION}, expected one")
        converted["visual.proj"] = transposed(converted.pop(_TRUNK_PROJECTION))
    return converted


def _from_timm(state: State) -> State:
    state = dict(state)
    bias = state.pop("head.bias", None)
    if bias is not None and bias.count_nonzero():
        raise ValueError("state dict: got head.bias with values, expected none or zeros: CLIP's projection has no bias")
    for theirs, name in _NAFLEX_VIT.items():
        state = {name + k.removeprefix(theirs) if k.startswith(theirs) else k: v for k, v in state.items()}
    positions = state.get("pos_embed")
    if positions is not None and positions.dim() == 4:  # NaFlexVit's grid
        state["pos_embed"] = positions.flatten(1, 2)
    return renamed_from(state, TIMM)


def _of_naflex_vit(state: State, grid: tuple[int, int] | None) -> State:
    named = {}
    for key, value in state.items():
        if key == "pos_embed":
            side = math.isqrt(value.shape[1])
            rows, columns = grid or (side, side)
            if rows * columns != value.shape[1]:
                raise ValueError(f"{key}: got {value.shape[1]} rows, expected {rows}·{columns} for NaFlex's grid")
            value = value.unflatten(1, (rows, columns))
        theirs = next((t for t, name in _NAFLEX_VIT.items() if key.startswith(name)), None)
        named[key if theirs is None else theirs + key.removeprefix(_NAFLEX_VIT[theirs])] = value
    return named


def _with_kernel(state: State) -> State:
    """Make a kernel of the matrix that embeds NaFlex's patches, whose columns are (row, column, channel)."""
    matrix = state.get("visual.conv1.weight")
    if matrix is not None and matrix.dim() == 2:
        side = math.isqrt(matrix.shape[1] // 3)
        if matrix.shape[1] == 3 * side * side:
            state["visual.conv1.weight"] = matrix.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    return state


def _normalised_openai(state: State) -> State:
    if any(k.startswith("text.transformer.") for k in state):  # open_clip's CustomTextCLIP
        state = {k.removeprefix("text."): v for k, v in state.items()}
    if any(k in state for k in ("class_embedding", "conv1.weight", "layer1.0.conv1.weight")):  # an image tower alone
        state = {f"visual.{k}": v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in _OPENAI_SIZES}


def _with_tower_prefix(state: State) -> State:
    """Give the keys of a tower that stands alone, which transformers 5 writes without one, their prefix."""
    if any(k.startswith(("vision_model.", "text_model.")) for k in state):
        return state
    tower = "text_model." if "embeddings.token_embedding.weight" in state else "vision_model."
    return {tower + k: v for k, v in state.items()}
