"""Loading and converting weights: all of them, or an error that lists what does not fit."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from clipfast.models.big_vision import heads_of, is_big_vision
from clipfast.models.checkpoint_files import check_target, read_state_dict, tensors_of, write_state_dict
from clipfast.models.key_layouts import (
    NAFLEX_LAYOUTS,
    check_layout,
    detect_layout,
    from_openai,
    grid_of,
    image_tower_of,
    is_classifier,
    is_from_openai,
    is_naflex,
    is_norm_after_pool,
    text_tower_of,
    to_openai,
    towers_of,
)
from clipfast.models.misfits import check_fit
from clipfast.models.resize import (
    check_grid,
    check_image_grid,
    check_text_positions,
    fit_image_positions,
    fit_text_positions,
)
from clipfast.models.stated import stated_gelus, stated_grid, stated_heads, stated_naflex, stated_norm_after_pool
from clipfast.models.wrappers import without_prefixes
from clipfast.modules.block import MLP
from clipfast.modules.resnet import ModifiedResNet
from clipfast.modules.text import TextTower, TextTransformer
from clipfast.modules.vit import ViT

Model = TypeVar("Model", bound=nn.Module)


def load_weights(
    model: Model,
    path_or_state_dict: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    resize: bool | str = False,
    grid: tuple[int, int] | None = None,
    text_positions: str = "linear",
    interpolate_image_positions: bool = False,
) -> Model:
    """Load weights of OpenAI's, open_clip's, transformers', timm's or big_vision's layout, told apart by their keys.

    Keys do not tell which GELU weights were trained with. OpenAI's archives (QuickGELU), big_vision's names (tanh) and
    the configurations that transformers and open_clip keep in a folder beside the weights do, for each tower, and then
    it must be the tower's; for any other file or state dict, give the model the right one: OpenAI's weights need one
    of the models named …-quickgelu, SigLIP's as Google published them one named …-tanhgelu.

    Args:
        model: A ``CLIP``, ``ViT``, ``ModifiedResNet`` or ``TextTransformer``. A tower takes its share of a whole
            model's weights, or of an image classifier's, whose linear layer is left out.
        path_or_state_dict: A state dict, or a file of one: safetensors, ``.pt``/``.bin`` as ``torch.save`` writes
            (tensors only; code in a file is never run), NumPy's ``.npz`` as big_vision writes it (bfloat16 too), or
            OpenAI's TorchScript archive; or a folder with one of
            transformers' or open_clip's weight files, sharded or not, or the index of shards. Checkpoints of training
            are looked into, and prefixes of wrappers taken off. Nothing is downloaded.
        resize: Whether a model of another resolution or context length gets its position embeddings resampled instead
            of an error: those of images by :func:`~clipfast.modules.vit.interpolate_positions`, those of text as
            ``text_positions`` says. ``"image"`` or ``"text"`` allows it for one of the towers.
        grid: The rows and columns of patches that the weights were trained with. Needed by ``resize`` where nothing
            tells: no configuration lies beside them, and as many patches can be several grids.
        text_positions: How ``resize`` makes more or fewer positions of text: ``"linear"``, as open_clip does, or
            ``"longclip"``, 248 of 77 (:func:`~clipfast.models.long_clip.stretch_positions`).
        interpolate_image_positions: As ``resize="image"``.

    Returns:
        ``model``, its parameters and buffers overwritten. They keep their own dtype and device: weights of another
        dtype are rounded or widened to it, as ``Tensor.copy_`` does.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``model`` is no module.
        ValueError: The file is corrupt or holds more than tensors; the keys are of no known layout; keys are
            missing, unexpected or misshapen (ten of each are named, the others counted); the weights were trained
            with another GELU than the model's, or with another grid of as many patches; ``grid`` is needed or wrong,
            or one of the options is given without ``resize``; or the model is on the meta device. The model is then
            as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a CLIP, ViT, ModifiedResNet or TextTransformer")
    grid = check_grid(grid)
    check_text_positions(text_positions)
    if resize not in (True, False, "image", "text"):
        raise ValueError(f"resize: got {resize!r}, expected True, False, 'image' or 'text'")
    images, text = resize in (True, "image") or interpolate_image_positions, resize in (True, "text")
    if grid is not None and not images:
        raise ValueError(f"grid: got {grid} without resize, expected resize=True with it")
    if text_positions != "linear" and not text:
        raise ValueError(f"text_positions: got {text_positions!r} without resize, expected resize=True with it")
    state = _read(path_or_state_dict)
    stated, assumed = _grids(path_or_state_dict, state, model)
    gelus = _gelus(path_or_state_dict, state)
    converted = to_openai(state)
    share = _share_of(model, converted)
    _check_gelu(model, gelus)
    if images:
        fit_image_positions(model, share, grid, stated + assumed)
    else:
        check_image_grid(model, share, stated)
    if text:
        fit_text_positions(model, share, text_positions)
    check_fit(model, share, lambda: _what_they_are(model, converted, detect_layout(without_prefixes(state))))
    with torch.no_grad():
        for name, target in model.state_dict(keep_vars=True).items():
            if name in share:
                target.copy_(share[name])
    return model


def convert_weights(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    target: str | os.PathLike[str],
    layout: str,
    *,
    naflex: bool | None = None,
    heads: tuple[int, int] | None = None,
) -> None:
    """Write weights in another key layout; a way there and back is bitwise.

    Weights alone are written: OpenAI's archives lose the sizes that mark them as trained with QuickGELU.

    Args:
        source: As for :func:`load_weights`.
        target: A ``.safetensors``, ``.pt`` or ``.bin`` file, or for ``"big_vision"`` an ``.npz`` file; it is replaced
            at once or not at all.
        layout: ``"openai"`` (this project's own, and open_clip's but for SigLIP), ``"open_clip"``,
            ``"transformers"``, ``"timm"``, which takes the image tower of the source, or ``"big_vision"``. See
            :func:`~clipfast.models.key_layouts.from_openai`. timm's last norm is ``fc_norm`` where the source or the
            configuration beside it says that it stands behind the pooling, and else ``norm``.
        naflex: Whether to write a NaFlex model of ``"transformers"``, ``"timm"`` or ``"big_vision"``, which embeds
            patches by a matrix; None does so where the source is one by its keys or the configuration beside it.
        heads: The attention heads of image and text tower, which big_vision's shapes tell. None is what the source or
            the configuration beside it tells, or those of big_vision's variant of the tower's width.

    Raises:
        FileNotFoundError: There is no such source.
        ValueError: The source is corrupt or of no known layout, ``layout`` is none of these or has no place for one
            of the keys, ``target`` has another ending, or ``heads`` are needed or wrong.
    """
    check_layout(layout)
    check_target(target)
    if (os.path.splitext(os.fspath(target))[1] == ".npz") != (layout == "big_vision"):
        raise ValueError(
            f"path: got {os.fspath(target)!r} for layout {layout!r}, expected "
            f"{'.npz' if layout == 'big_vision' else '.safetensors, .pt or .bin'}"
        )
    if heads is not None and (len(heads) != 2 or not all(isinstance(h, int) and h > 0 for h in heads)):
        raise ValueError(f"heads: got {heads!r}, expected (image, text), each at least 1")
    raw = _read(source)
    state = to_openai(raw)
    if layout == "timm":
        state = image_tower_of(state)
        if not state:
            raise ValueError("layout 'timm': got weights without an image tower, expected one: timm has no text towers")
    # the weights themselves tell, or a configuration beside them
    its_heads, its_naflex, norm_after_pool = heads_of(raw), is_naflex(raw), is_norm_after_pool(raw)
    if not isinstance(source, Mapping):
        its_heads = tuple(its or told for its, told in zip(its_heads, stated_heads(source), strict=True))
        its_naflex = its_naflex or stated_naflex(source)
        norm_after_pool = norm_after_pool or stated_norm_after_pool(source)
    if naflex is None:
        naflex = its_naflex and layout in NAFLEX_LAYOUTS
    converted = from_openai(
        state, layout, naflex=naflex, heads=heads or its_heads, grid=grid_of(raw), norm_after_pool=norm_after_pool
    )
    write_state_dict(converted, target)


def _read(source: str | os.PathLike[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
    return tensors_of(source, "state dict") if isinstance(source, Mapping) else read_state_dict(source)


def _gelus(
    source: str | os.PathLike[str] | Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, frozenset[str]]:
    """Return the GELUs that the weights of each tower may have been trained with; none if that is not known."""
    if is_from_openai(state):
        return dict.fromkeys(("image", "text"), frozenset({"quick"}))
    if is_big_vision(without_prefixes(state)):  # flax's GELU is tanh
        return dict.fromkeys(("image", "text"), frozenset({"tanh"}))
    return {} if isinstance(source, Mapping) else stated_gelus(source)


def _share_of(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that are meant for ``model``, under its own keys."""
    if isinstance(model, (ViT, ModifiedResNet)):
        share = {k.removeprefix("visual."): v for k, v in image_tower_of(state).items()}
        own = model.state_dict(keep_vars=True)
        if is_classifier(state) and "attn_pool.probe" not in own:
            # SigLIP's classifiers read the mean of all tokens, and hold a pooling that they do not use
            share = {k: v for k, v in share.items() if not k.startswith("attn_pool.")}
        return share
    if isinstance(model, TextTransformer):
        state = text_tower_of(state)
    if isinstance(model, TextTower) and model.text_projection is None and _is_identity(state):
        return {k: v for k, v in state.items() if not k.startswith("text_projection.")}
    return state


def _is_identity(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a projection of text does nothing; transformers has one where SigLIP's text tower has none."""
    weight, bias = state.get("text_projection.weight"), state.get("text_projection.bias")
    if weight is None or bias is None or weight.dim() != 2 or weight.shape[0] != weight.shape[1]:
        return False
    return not bias.count_nonzero() and torch.equal(
        weight, torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    )


def _check_gelu(model: nn.Module, gelus: Mapping[str, frozenset[str]]) -> None:
    """Raise ValueError where a tower's GELU is known to be another than the model's."""
    image = model if isinstance(model, (ViT, ModifiedResNet)) else getattr(model, "visual", None)
    of_image = set() if image is None else {id(m) for m in image.modules()}
    for tower in ("image", "text"):
        theirs = gelus.get(tower)
        own = {
            m.approximate for m in model.modules() if isinstance(m, MLP) and (id(m) in of_image) == (tower == "image")
        }
        if theirs and (wrong := own - theirs):
            raise ValueError(
                f"model: got approximate={wrong.pop()!r} in the {tower} tower, expected "
                f"{' or '.join(map(repr, sorted(theirs)))}, which the weights were trained with; models named "
                f"…-quickgelu have 'quick', those named …-tanhgelu 'tanh', the others what open_clip computes"
            )


def _grids(
    source: str | os.PathLike[str] | Mapping[str, Tensor], state: Mapping[str, Tensor], model: nn.Module
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Return the grids of patches that the weights' own words tell, and those that their kind lets one assume."""
    stated, assumed = [], []
    if not isinstance(source, Mapping):
        stated.append(stated_grid(source))
    if is_from_openai(state) and "visual.conv1.weight" in state:
        side = int(state["input_resolution"]) // state["visual.conv1.weight"].shape[-1]
        stated.append((side, side))
    assumed.append(getattr(getattr(model, "visual", model), "weights_grid", None))
    if (grid := grid_of(state)) is not None:
        stated.append(grid)
    # transformers knows square pictures alone
    key = next((k for k in state if k.endswith("embeddings.patch_embedding.weight")), "")
    positions = state.get(key.replace("patch_embedding.weight", "position_embedding.weight"))
    if key and positions is not None and positions.dim() == 2:
        tokens = positions.shape[0] - (key.replace("patch_embedding.weight", "class_embedding") in state)
        assumed.append((math.isqrt(max(0, tokens)),) * 2)
    return [grid for grid in stated if grid], [grid for grid in assumed if grid]


def _what_they_are(model: nn.Module, state: Mapping[str, Tensor], layout: str) -> str | None:
    """Say what weights are that lack a tower which the model has; None of others.

    Args:
        model: What they are for.
        state: All of them, in OpenAI's layout.
        layout: The one that they came in.
    """
    there = towers_of(state)
    if len(there) != 1:
        return None
    (tower,) = there
    alone = f"They are {'an image' if tower == 'image' else 'a text'} tower alone, in the layout of {layout}."
    if isinstance(model, (ViT, ModifiedResNet)):
        return f"{alone} This is an image tower." if tower == "text" else None
    if isinstance(model, TextTransformer):
        return f"{alone} This is a text tower." if tower == "image" else None
    if tower == "image":
        return (
            f"{alone} A CLIP needs a text tower too: give weights of both. The image tower is loaded by "
            f"clipfast.load_weights(model.visual, weights), for pictures without texts."
        )
    return (
        f"{alone} A CLIP needs an image tower too: give weights of both. The text tower is loaded into a "
        f"clipfast.TextTransformer, for texts without pictures."
    )
