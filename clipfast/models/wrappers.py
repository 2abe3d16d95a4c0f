"""What training puts around weights: dicts of a checkpoint, and prefixes of keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# open_clip and Lightning; many training loops; clipfast and many training loops; DeepSpeed
_WRAPPING_KEYS = ("state_dict", "model_state_dict", "model", "module")

# before all keys: DDP, DeepSpeed and AveragedModel; Lightning's attribute, also over DeepSpeed; others' attributes
_PREFIXES = ("module.", "model.", "_forward_module.", "clip.", "clip_model.", "net.", "ema_model.")
# before or within keys, since parts of a model are wrapped too: torch.compile, FSDP, activation checkpointing
_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

# how AveragedModel counts; it is no weight
_COUNTER = "n_averaged"

# how keys of the known layouts begin, whole models' and single towers'
_CLIP_KEYS = (
    "visual.",
    "text.",
    "transformer.resblocks.",
    "token_embedding.",
    "positional_embedding",
    "text_projection",
    "ln_final.",
    "logit_scale",
    "logit_bias",
    "class_embedding",
    "conv1.",
    "ln_pre.",
    "ln_post.",
    "layer1.",
    "layer2.",
    "layer3.",
    "layer4.",
    "attnpool.",
    "vision_model.",
    "text_model.",
    "visual_projection.",
    "embeddings.",
    "encoder.layers.",
    "pre_layrnorm.",
    "post_layernorm.",
    "final_layer_norm.",
    "cls_token",
    "pos_embed",
    "patch_embed.",
    "norm_pre.",
    "blocks.",
    "trunk.",
    "attn_pool.",
    "embeds.",
)


def unwrapped(content: Any) -> Any:
    """Return the innermost dict of weights that a checkpoint's content holds, or ``content`` where there is none.

    Looks into ``state_dict``, ``model_state_dict``, ``model`` and ``module``, in this order, nested as they come; one
    without a tensor, such as the configuration of a model, is passed over where another has some.
    """
    while isinstance(content, Mapping):
        inner = [content[key] for key in _WRAPPING_KEYS if isinstance(content.get(key), Mapping)]
        if not inner:
            return content
        content = next((part for part in inner if _holds_tensors(part)), inner[0])
    return content


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take off what wrappers put before every key of CLIP, in any order and however often.

    Prefixes of parts (``transformer._orig_mod.resblocks…``) are taken off wherever they are, and the counter of
    ``torch.optim.swa_utils.AveragedModel`` is left out. Keys that CLIP does not have keep their names.

    Raises:
        ValueError: CLIP's keys come under more than one prefix, so that it is not known which model is meant, or two
            keys become one.
    """
    found = {key: _split(key) for key in state}
    prefixes = sorted({prefix for prefix, core in found.values() if core.startswith(_CLIP_KEYS)})
    if len(prefixes) > 1:
        some = ", ".join(repr(prefix) for prefix in prefixes[:4])
        raise ValueError(
            f"state dict: got keys of CLIP under {len(prefixes)} prefixes ({some}), expected one: pass the keys of one "
            f"model alone, without its prefix"
        )
    prefix = prefixes[0] if prefixes else ""
    clean: dict[str, Tensor] = {}
    for key, value in state.items():
        its, core = found[key]
        if core == _COUNTER:
            continue
        name = core if its == prefix else key
        if name in clean:
            raise ValueError(f"state dict: got two keys for {name}, expected one: {key} is the second")
        clean[name] = value
    return clean


def _split(key: str) -> tuple[str, str]:
    """Return what wrappers put before a key, without the marks of wrapped parts, and the key."""
    key = ".".join(part for part in key.split(".") if part not in _PARTS)
    core = key
    while prefix := next((p for p in _PREFIXES if core.startswith(p)), ""):
        core = core.removeprefix(prefix)
    # DDP around one tower stands behind the tower's name
    return key[: len(key) - len(core)], core.replace(".module.", ".")


def _holds_tensors(content: Any) -> bool:
    if isinstance(content, Mapping):
        return any(_holds_tensors(value) for value in content.values())
    return isinstance(content, Tensor)
