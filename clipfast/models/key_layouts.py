"""The key layouts that CLIP weights come in, and the ways between them.

OpenAI's layout is open_clip's and this project's own. The others are described by what they rename; all of them
hold the same numbers, so a way there and back is bitwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

State = dict[str, Tensor]

LAYOUTS = ("openai", "transformers", "timm")

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
    some = ", ".join(list(state)[:5]) or "none"
    raise ValueError(f"state dict: got keys of no known layout ({some}, …), expected those of {', '.join(LAYOUTS)}")


def is_from_openai(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a state dict is OpenAI's own, by the sizes that only OpenAI's archives hold."""
    return all(name in state for name in _OPENAI_SIZES)


def to_openai(state: Mapping[str, Tensor]) -> State:
    """Bring a state dict of any layout into OpenAI's; image towers get the prefix ``visual.``.

    Tensors are views of those that came, or joined from them. Keys that no layout has are kept as they are.

    Raises:
        ValueError: Keys of no known layout, a projection bias that CLIP has no place for, or an incomplete QKV.
    """
    state = {k: v for k, v in _without_wrappers(state).items() if not _NOT_WEIGHTS.search(k)}
    layout = detect_layout(state)
    if layout == "openai":
        return _normalised_openai(state)
    if layout == "transformers":
        state = _with_tower_prefix(state)
    if layout == "timm":
        bias = state.pop("head.bias", None)
        # a bias of zeros, which timm's own conversions of CLIP hold, is no bias
        if bias is not None and bias.count_nonzero():
            raise ValueError("state dict: got head.bias with values, expected none: CLIP's projection has no bias")
    return _from_other(state, _OTHERS[layout])


def from_openai(state: Mapping[str, Tensor], layout: str) -> State:
    """Bring a state dict of OpenAI's layout into another.

    Args:
        state: Keys as of :func:`to_openai`.
        layout: ``"openai"``, ``"transformers"`` (a whole model or one tower of it) or ``"timm"`` (an image tower).

    Raises:
        ValueError: ``layout`` is none of these, or has no place for one of the keys.
    """
    if layout == "openai":
        return dict(state)
    if layout not in _OTHERS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(map(repr, LAYOUTS))}")
    other = _OTHERS[layout]
    converted: State = {}
    homeless = []
    for key, value in state.items():
        if re.search(r"\.attn\.in_proj_(weight|bias)$", key):
            stem, kind = key.rsplit(".attn.in_proj_", 1)
            block = _rename(stem + ".", other.stacks)
            if block is not None:
                parts = value.chunk(len(other.qkv)) if len(other.qkv) > 1 else (value,)
                converted |= {block + name + kind: part for name, part in zip(other.qkv, parts, strict=True)}
                continue
        name = _rename_key(key, other.names, other.stacks, other.in_block)
        if name is None:
            homeless.append(key)
            continue
        if key in other.transposed:
            value = value.T
        for _ in range(other.leading_ones.get(key, 0)):
            value = value[None]
        converted[name] = value
    if homeless:
        raise ValueError(f"layout {layout!r}: got keys that it has no place for: {_listed(homeless)}")
    return {k: v.contiguous() for k, v in converted.items()}


def _from_other(state: State, other: _Layout) -> State:
    names, stacks, in_block = (_inverted(m) for m in (other.names, other.stacks, other.in_block))
    converted: State = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for key, value in state.items():
        found = re.fullmatch(rf"(.*\.\d+\.)({'|'.join(map(re.escape, other.qkv))})(weight|bias)", key)
        if found and (block := _rename(found[1], stacks)) is not None:
            parts.setdefault(f"{block}attn.in_proj_{found[3]}", {})[other.qkv.index(found[2])] = value
            continue
        name = _rename_key(key, names, stacks, in_block) or key
        for _ in range(other.leading_ones.get(name, 0)):
            value = value[0]
        converted[name] = value.T if name in other.transposed else value
    for name, values in parts.items():
        if len(values) < len(other.qkv):
            missing = [other.qkv[i].rstrip(".") for i in range(len(other.qkv)) if i not in values]
            raise ValueError(f"state dict: {name} lacks {', '.join(missing)}")
        converted[name] = torch.cat([values[i] for i in range(len(other.qkv))])
    return converted


def _without_wrappers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Take off what DDP (``module.``) and torch.compile (``_orig_mod.``) put before every key."""
    for prefix in ("module.", "_orig_mod."):
        if state and all(k.startswith(prefix) for k in state):
            return _without_wrappers({k.removeprefix(prefix): v for k, v in state.items()})
    return state


def _normalised_openai(state: State) -> State:
    if any(k.startswith("text.transformer.") for k in state):  # open_clip's CustomTextCLIP
        state = {k.removeprefix("text."): v for k, v in state.items()}
    alone = ("class_embedding" in state or "layer1.0.conv1.weight" in state) and "visual.proj" not in state
    if alone:
        state = {f"visual.{k}": v for k, v in state.items()}
    return {k: v for k, v in state.items() if k not in _OPENAI_SIZES}


def _with_tower_prefix(state: State) -> State:
    """Give the keys of a tower that stands alone, which transformers 5 writes without one, their prefix."""
    if any(k.startswith(("vision_model.", "text_model.")) for k in state):
        return state
    tower = "text_model." if "embeddings.token_embedding.weight" in state else "vision_model."
    return {k if k.endswith("_projection.weight") else tower + k: v for k, v in state.items()}


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


def _listed(keys: list[str], most: int = 10) -> str:
    return ", ".join(keys[:most]) + (f", … ({len(keys)} in all)" if len(keys) > most else "")
