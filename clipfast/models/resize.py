"""Position embeddings for another resolution or context length than weights were trained with."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.models.long_clip import stretch_positions, stretched_length
from clipfast.modules.resnet import ModifiedResNet
from clipfast.modules.text import TextTower
from clipfast.modules.vit import ViT, interpolate_positions

TEXT_POSITIONS = ("linear", "longclip")


def check_text_positions(text_positions: str) -> None:
    """Raise ValueError unless ``text_positions`` is one of :data:`TEXT_POSITIONS`."""
    if text_positions not in TEXT_POSITIONS:
        raise ValueError(
            f"text_positions: got {text_positions!r}, expected one of {', '.join(map(repr, TEXT_POSITIONS))}"
        )


def check_grid(grid: object) -> tuple[int, int] | None:
    """Return a grid of patches as a pair, or None; raise unless it is one."""
    if grid is None:
        return None
    pair = tuple(grid) if isinstance(grid, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"grid: got {grid!r}, expected (rows, columns) of patches")
    return pair


def fit_image_positions(
    model: nn.Module,
    state: MutableMapping[str, Tensor],
    grid: tuple[int, int] | None,
    believed: Sequence[tuple[int, int]] = (),
) -> None:
    """Resample the image tower's position embeddings in ``state`` for ``model``, in place.

    Args:
        model: A CLIP, ViT or ModifiedResNet; others have none.
        state: Weights under the model's own keys.
        grid: The grid of patches that the weights were trained with, as the caller says.
        believed: Grids that something beside the weights speaks of; the first that has as many patches counts.

    Raises:
        ValueError: ``grid`` is not that of the rows, or none is known and the rows can be several.
    """
    tower, key, new = _image_positions(model)
    if tower is None or key not in state or state[key].dim() != 2:
        return
    patches = state[key].shape[0] - _rows_before(tower)
    grid = grid or _first_fitting(believed, patches)
    if grid is None and patches == new[0] * new[1]:
        return
    # a ResNet's maps are square, and so are its positions
    old = grid or _only_grid(patches, square=isinstance(tower, ModifiedResNet), before=_rows_before(tower))
    if old[0] * old[1] != patches:
        raise ValueError(
            f"grid: got {old[0]}×{old[1]}, expected rows · columns = {patches}, the patches that {key} is for"
        )
    if old != new:
        state[key] = interpolate_positions(state[key], old, new, _rows_before(tower))


def check_image_grid(model: nn.Module, state: Mapping[str, Tensor], believed: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError where weights are known to be of another grid than the model's, though of as many patches."""
    tower, key, new = _image_positions(model)
    if tower is None or key not in state or state[key].dim() != 2:
        return
    if state[key].shape[0] != _rows_before(tower) + new[0] * new[1]:
        return
    old = _first_fitting(believed, new[0] * new[1])
    if old not in (None, new):
        raise ValueError(
            f"{key}: got weights of {old[0]}×{old[1]} patches, by the configuration beside them, expected "
            f"{new[0]}×{new[1]}, the model's; resize=True resamples them"
        )


def fit_text_positions(model: nn.Module, state: MutableMapping[str, Tensor], how: str) -> None:
    """Resample the text tower's position embeddings in ``state`` for ``model``, in place.

    Args:
        model: A CLIP or TextTransformer; others have none.
        state: Weights under the model's own keys.
        how: ``"linear"``, as open_clip does, or ``"longclip"`` (:func:`~clipfast.models.long_clip.stretch_positions`).

    Raises:
        ValueError: ``how`` is none of these, or Long-CLIP's stretching gives another length than the model's.
    """
    check_text_positions(how)
    key = "positional_embedding"
    if not isinstance(model, TextTower) or key not in state or state[key].dim() != 2 or not state[key].shape[0]:
        return
    old, new = state[key].shape[0], model.context_length
    if old == new:
        return
    if how == "longclip":
        if stretched_length(old) != new:
            raise ValueError(
                f"text_positions='longclip': got weights of {old} positions for context_length = {new}, expected "
                f"context_length = {stretched_length(old)}"
            )
        state[key] = stretch_positions(state[key])
    else:
        state[key] = interpolate_text_positions(state[key], new)


def interpolate_text_positions(positions: Tensor, length: int) -> Tensor:
    """Resample learned position embeddings of text to another length, as open_clip does.

    Args:
        positions: ``[L, W]``.
        length: L'.

    Returns:
        ``[L', W]`` in the dtype of ``positions``; linear, corners not aligned.
    """
    dtype = torch.promote_types(positions.dtype, torch.float32)
    rows = F.interpolate(positions.T[None].to(dtype), size=length, mode="linear", align_corners=False)
    return rows[0].T.contiguous().to(positions.dtype)


def _image_positions(model: nn.Module) -> tuple[nn.Module | None, str, tuple[int, int]]:
    """Return the image tower of a model, the key of its positions in the model's state dict, and their grid."""
    own = isinstance(model, (ViT, ModifiedResNet))
    tower, prefix = (model, "") if own else (getattr(model, "visual", None), "visual.")
    if isinstance(tower, ViT):
        return tower, f"{prefix}positional_embedding", tower.grid_size
    if isinstance(tower, ModifiedResNet):
        height, width = tower.image_size
        return tower, f"{prefix}attnpool.positional_embedding", (height // 32, width // 32)
    return None, "", (0, 0)


def _rows_before(tower: nn.Module) -> int:
    """Return how many rows of an image tower's positions lie before the patches': the class token's, or none."""
    return int(tower.class_token) if isinstance(tower, ViT) else 1


def _first_fitting(grids: Sequence[tuple[int, int]], patches: int) -> tuple[int, int] | None:
    return next((grid for grid in grids if grid[0] * grid[1] == patches), None)


def _only_grid(patches: int, square: bool, before: int = 1) -> tuple[int, int]:
    """Return the one grid that so many patches can be; a row or column of patches is none."""
    grids = [(h, patches // h) for h in range(1, patches + 1) if patches % h == 0]
    grids = [(h, w) for h, w in grids if h == w or (not square and h > 1 and w > 1)]
    if len(grids) == 1:
        return grids[0]
    grids.sort(key=lambda sides: max(sides) / min(sides))
    may = f": {patches} patches may be {', '.join(f'{h}×{w}' for h, w in grids[:3])} or others" if grids else ""
    raise ValueError(
        f"positions: got {patches + before} rows, expected {before} + rows · columns of a grid that is known{may}; "
        f"pass grid=(rows, columns), which the weights were trained with"
    )
