"""Loading and converting weights: all of them, or an error that lists what does not fit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipfast.models.checkpoint_files import read_state_dict, write_state_dict
from clipfast.models.key_layouts import from_openai, is_from_openai, to_openai
from clipfast.modules.resnet import ModifiedResNet
from clipfast.modules.text import TextTransformer
from clipfast.modules.transformer import MLP
from clipfast.modules.vit import ViT, interpolate_positions

Model = TypeVar("Model", bound=nn.Module)


def load_weights(
    model: Model,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    interpolate_image_positions: bool = False,
) -> Model:
    """Load weights of OpenAI's, open_clip's, transformers' or timm's key layout, told apart by their keys.

    Args:
        model: A ``CLIP``, ``ViT``, ``ModifiedResNet`` or ``TextTransformer``. A tower takes its share of a whole
            model's weights.
        path_or_state_dict: A state dict, or a file of one: safetensors, ``.pt``/``.bin`` as ``torch.save`` writes
            (tensors only; code in a file is never run), or OpenAI's TorchScript archive; or a folder with one of
            transformers' or open_clip's weight files.
        interpolate_image_positions: Whether a ViT of another resolution gets its position embeddings resampled
            (:func:`~clipfast.modules.vit.interpolate_positions`, square grids) instead of an error.

    Returns:
        ``model``, its parameters and buffers overwritten in their own dtype and device.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is corrupt or holds more than tensors; the keys are of no known layout; keys are
            missing, unexpected or misshapen (all listed); or the weights are OpenAI's, trained with QuickGELU, and
            the model has another GELU. The model is then as it was.
    """
    state = path_or_state_dict
    if not isinstance(state, Mapping):
        state = read_state_dict(state)
    from_openai_archive = is_from_openai(state)
    state = _share_of(model, to_openai(state))
    if from_openai_archive:
        _require_quick_gelu(model)
    if interpolate_image_positions:
        _fit_positions(model, state)
    _check_fit(model, state)
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            if name in state:
                target.copy_(state[name])
    return model


def convert_weights(
    source: str | os.PathLike[str] | Mapping[str, Tensor], target: str | os.PathLike[str], layout: str
) -> None:
    """Write weights in another key layout; a way there and back is bitwise.

    Args:
        source: As for :func:`load_weights`.
        target: A ``.safetensors`` or ``.pt`` file; it is replaced at once or not at all.
        layout: ``"openai"`` (open_clip's too), ``"transformers"``, or ``"timm"``, which takes the image tower of
            the source.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: The source is corrupt or of no known layout, ``layout`` is none of these or has no place for one
            of the keys, or ``target`` has another ending.
    """
    state = source if isinstance(source, Mapping) else read_state_dict(source)
    state = to_openai(state)
    if layout == "timm":
        state = {k: v for k, v in state.items() if k.startswith("visual.")}
        if not state:
            raise ValueError("layout 'timm': got weights without an image tower, expected one: timm has no text towers")
    write_state_dict(from_openai(state, layout), target)


def _share_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that are meant for ``model``, under its own keys."""
    if isinstance(model, (ViT, ModifiedResNet)):
        return {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    if isinstance(model, TextTransformer):
        return {k: v for k, v in state.items() if not k.startswith(("visual.", "logit_"))}
    return state


def _require_quick_gelu(model: nn.Module) -> None:
    wrong = {m.approximate for m in model.modules() if isinstance(m, MLP)} - {"quick"}
    if wrong:
        raise ValueError(
            f"model: got approximate={wrong.pop()!r}, expected 'quick' for OpenAI's weights; the models named "
            f"…-quickgelu have it"
        )


def _fit_positions(model: nn.Module, state: dict[str, Tensor]) -> None:
    tower, key = (model, "") if isinstance(model, ViT) else (getattr(model, "visual", None), "visual.")
    key += "positional_embedding"
    if not isinstance(tower, ViT) or key not in state:
        return
    side = round((state[key].shape[0] - 1) ** 0.5)
    state[key] = interpolate_positions(state[key], (side, side), tower.grid_size)


def _check_fit(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict(keep_vars=True)
    # BatchNorm's step counters came later than some checkpoints, and nothing reads them
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    misshapen = [
        f"{k} (got {tuple(state[k].shape)}, expected {tuple(own[k].shape)})"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    not_float = [
        f"{k} (got {state[k].dtype})"
        for k in own
        if k in state and own[k].is_floating_point() and not state[k].is_floating_point()
    ]
    faults = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "not floating point": not_float}
    if any(faults.values()):
        lines = [f"  {what}: {', '.join(keys)}" for what, keys in faults.items() if keys]
        raise ValueError(
            f"weights do not fit this {type(model).__name__}; nothing was loaded (keys in OpenAI's layout)\n"
            + "\n".join(lines)
        )
