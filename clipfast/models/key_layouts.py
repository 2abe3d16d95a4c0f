"""The key layouts that CLIP weights come in, and the ways between them.

OpenAI's layout is open_clip's and this project's own; the others are described by how they rename it. All of them
hold the same numbers, so a way there and back is bitwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipfast.models.long_clip import with_one_table
from clipfast.models.wrappers import without_prefixes

State = dict[str, Tensor]

LAYOUTS = ("openai", "transformers", "timm")

_OPENAI_KEY = re.compile(
    r"""logit_(scale|bias) | positional_embedding | text_projection | token_embedding\.weight | ln_final\.(weight|bias)
    | visual\.(class_embedding | positional_embedding | proj | conv1\.weight | ln_(pre|post)\.(weight|bias))
    | (visual\.)?transformer\.resblocks\.\d+\.
        (attn\.in_proj_(weight|bias) | (ln_[12] | attn\.out_proj | mlp\.c_(fc|proj))\.(weight|bias))
    | visual\.(layer[1-4]\.\d+\.)?
        (conv[123]\.weight | (bn[123] | downsample\.[01])\.(weight|bias|running_(mean|var)|num_batches_tracked))
    | visual\.attnpool\.(positional_embedding | [qkvc]_proj\.(weight|bias))""",
    re.VERBOSE,
)
# the beginnings of one tower's keys, those of other layouts too, for keys that found no name in OpenAI's
_IMAGE_KEYS = ("visual.", "vision_model.")
_TEXT_KEYS = (
    "positional_embedding",
    "text_projection",
    "token_embedding.",
    "transformer.",
    "ln_final.",
    "text.",
    "text_model.",
)
_KEYS_OF_BOTH = ("logit_scale", "logit_bias")

# what OpenAI's archives hold beside weights, and masks that older open_clip and transformers kept in the state dict
_OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")
_NOT_WEIGHTS = re.compile(r"(^|\.)(attn_mask|position_ids)$")


@dataclass(frozen=True)
class _Layout:
    """How another layout names what OpenAI's names.

    ``names`` pairs OpenAI's keys, or the beginnings of keys that end with a dot, with the other's. ``stacks`` pairs
    the beginnings of OpenAI's block keys with the other's. ``in_block`` does the same within a block. ``qkv`` is how
    the other names the packed QKV projection, or its three parts.
    """

    names: Mapping[str, str]
    stacks: Mapping[str, str]
    in_block: Mapping[str, str]
    qkv: tuple[str, ...]
    transposed: frozenset[str]
    leading_ones: Mapping[str, int]


_TRANSFORMERS = _Layout(
    names={
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.": "text_model.final_layer_norm.",
        "text_projection": "text_projection.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",  # so spelt there
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.proj": "visual_projection.weight",
    },
    stacks={
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
    },
    in_block={
        "ln_1.": "layer_norm1.",
        "attn.out_proj.": "self_attn.out_proj.",
        "ln_2.": "layer_norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    },
    qkv=("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj."),
    transposed=frozenset({"text_projection", "visual.proj"}),
    leading_ones={},
)

_TIMM = _Layout(
    names={
        "visual.class_embedding": "cls_token",
        "visual.positional_embedding": "pos_embed",
        "visual.conv1.": "patch_embed.proj.",
        "visual.ln_pre.": "norm_pre.",
        "visual.ln_post.": "norm.",
        "visual.proj": "head.weight",
    },
    stacks={"visual.transformer.resblocks.": "blocks."},
    in_block={
        "ln_1.": "norm1.",
        "attn.out_proj.": "attn.proj.",
        "ln_2.": "norm2.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    },
    qkv=("attn.qkv.",),
    transposed=frozenset({"visual.proj"}),
    leading_ones={"visual.class_embedding": 2, "visual.positional_embedding": 1},
)

_OTHERS = {"transformers": _TRANSFORMERS, "timm": _TIMM}


def detect_layout(state: Mapping[str, Tensor]) -> str:
    """Tell a state dict's layout by its keys: ``"openai"``, ``"transformers"`` or ``"timm"``.

    Raises:
        ValueError: The keys are of none of them.
    """
    if any(k.startswith(("vision_model.", "text_model.", "embeddings.", "encoder.layers.")) for k in state):
        return "transformers"
    if "cls_token" in state or "patch_embed.proj.weight" in state:
        return "timm"
    if any(k.startswith(("visual.", "transformer.resblocks.", "text.transformer.", "layer1.0.")) for k in state):
        return "openai"
    raise ValueError(
        f"state dict: got keys of no known layout ({_listed(list(state), 5)}), expected those of {', '.join(LAYOUTS)}"
    )


def is_from_openai(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict is OpenAI's own, by the sizes that only OpenAI's archives hold."""
    return all(name in state for name in _OPENAI_SIZES)


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
    if layout == "transformers":
        return _from_other(_with_tower_prefix(state), _TRANSFORMERS)
    bias = state.pop("head.bias", None)
    if bias is not None and bias.count_nonzero():
        raise ValueError("state dict: got head.bias with values, expected none or zeros: CLIP's projection has no bias")
    return _from_other(state, _TIMM)


def from_openai(state: Mapping[str, Tensor], layout: str) -> State:
    """Bring a state dict of OpenAI's layout into another.

    Args:
        state: Keys as of :func:`to_openai`.
        layout: ``"openai"``; ``"transformers"``, a whole model or one tower of it, with the prefixes that a whole
            model's keys have; or ``"timm"``, an image tower, whose projection gets a bias of zeros as in timm's own
            conversions.

    Returns:
        Contiguous tensors, views of those that came where they can be.

    Raises:
        ValueError: ``layout`` is none of these or has no place for one of the keys, or a QKV projection is not
            three of equal size.
    """
    check_layout(layout)
    if layout == "openai":
        converted, homeless = dict(state), [k for k in state if not _OPENAI_KEY.fullmatch(k)]
    else:
        converted, homeless = _to_other(state, _OTHERS[layout])
    if homeless:
        raise ValueError(f"layout {layout!r}: got keys that it has no place for: {_listed(homeless, 10)}")
    if layout == "timm" and "head.weight" in converted:
        converted["head.bias"] = converted["head.weight"].new_zeros(converted["head.weight"].shape[0])
    return {k: v.contiguous() for k, v in converted.items()}


def image_tower_of(state: Mapping[str, Tensor]) -> State:
    """Return the image tower's share of weights in OpenAI's layout, and whatever is of no known place."""
    return {k: v for k, v in state.items() if not k.startswith(_TEXT_KEYS + _KEYS_OF_BOTH)}


def text_tower_of(state: Mapping[str, Tensor]) -> State:
    """Return the text tower's share of weights in OpenAI's layout, and whatever is of no known place."""
    return {k: v for k, v in state.items() if not k.startswith(_IMAGE_KEYS + _KEYS_OF_BOTH)}


def _to_other(state: Mapping[str, Tensor], other: _Layout) -> tuple[State, list[str]]:
    """Return the weights in another layout, and the keys that it has no place for."""
    converted: State = {}
    homeless = []
    for key, value in state.items():
        found = re.fullmatch(r"(.*\.\d+\.)attn\.in_proj_(weight|bias)", key)
        if found and (block := _rename(found[1], other.stacks)) is not None:
            names = [block + name + found[2] for name in other.qkv]
            converted.update(zip(names, _split(key, value, len(names)), strict=True))
            continue
        name = _rename_key(key, other.names, other.stacks, other.in_block)
        if name is None:
            homeless.append(key)
            continue
        if key in other.transposed:
            value = _transposed(value)
        converted[name] = value[(None,) * other.leading_ones.get(key, 0)]
    return converted, homeless


def _from_other(state: State, other: _Layout) -> State:
    names, stacks, in_block = (_inverted(m) for m in (other.names, other.stacks, other.in_block))
    converted: State = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(rf"(.*\.\d+\.)({'|'.join(map(re.escape, other.qkv))})(weight|bias)", key)
        if found and (block := _rename(found[1], stacks)) is not None:
            parts.setdefault(f"{block}attn.in_proj_{found[3]}", {})[found[2]] = value
            continue
        name = _rename_key(key, names, stacks, in_block) or key
        for _ in range(other.leading_ones.get(name, 0)):
            # what has another shape keeps it and is refused by whoever knows the model's
            value = value[0] if value.dim() > 1 and value.shape[0] == 1 else value
        converted[name] = _transposed(value) if name in other.transposed else value
    return converted | {name: _join(name, values, other.qkv) for name, values in parts.items()}


def _split(key: str, value: Tensor, parts: int) -> tuple[Tensor, ...]:
    if value.dim() == 0 or value.shape[0] % parts:
        raise ValueError(f"{key}: got shape {tuple(value.shape)}, expected {parts} equal parts in the first dimension")
    return value.chunk(parts)


def _join(key: str, parts: Mapping[str, Tensor], names: tuple[str, ...]) -> Tensor:
    kinds = {
        name.rstrip("."): (tuple(parts[name].shape), parts[name].dtype) if name in parts else None for name in names
    }
    if None in kinds.values() or len(set(kinds.values())) > 1:
        came = ", ".join(f"{name} {kind or 'missing'}" for name, kind in kinds.items())
        raise ValueError(f"state dict: got {came} for {key}, expected all of one shape and dtype")
    return torch.cat([parts[name] for name in names])


def _transposed(value: Tensor) -> Tensor:
    return value.T if value.dim() == 2 else value


def _normalised_openai(state: State) -> State:
    if any(k.startswith("text.transformer.") for k in state):  # open_clip's CustomTextCLIP
        state = {k.removeprefix("text."): v for k, v in state.items()}
    if "class_embedding" in state or "layer1.0.conv1.weight" in state:  # an image tower alone
        state = {f"visual.{k}": v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in _OPENAI_SIZES}


def _with_tower_prefix(state: State) -> State:
    """Give the keys of a tower that stands alone, which transformers 5 writes without one, their prefix."""
    if any(k.startswith(("vision_model.", "text_model.")) for k in state):
        return state
    tower = "text_model." if "embeddings.token_embedding.weight" in state else "vision_model."
    return {tower + k: v for k, v in state.items()}


def _rename(key: str, prefixes: Mapping[str, str]) -> str | None:
    for old, new in prefixes.items():
        if key.startswith(old):
            return new + key[len(old) :]
    return None


def _rename_key(
    key: str, names: Mapping[str, str], stacks: Mapping[str, str], in_block: Mapping[str, str]
) -> str | None:
    for old, new in names.items():
        if key == old or (old.endswith(".") and key.startswith(old)):
            return new + key[len(old) :]
    found = re.fullmatch(r"(.*?\.)(\d+\.)(.*)", key)
    if found is None or found[1] not in stacks:
        return None
    rest = _rename(found[3], in_block)
    return None if rest is None else stacks[found[1]] + found[2] + rest


def _inverted(mapping: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in mapping.items()}


def _listed(keys: list[str], most: int) -> str:
    return ", ".join(keys[:most]) + (f", … ({len(keys)} in all)" if len(keys) > most else "")
