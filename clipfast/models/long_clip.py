"""Long-CLIP: longer texts from CLIP's weights, and its checkpoints' two tables of positions.

Source: Zhang et al., "Long-CLIP: Unlocking the Long-Text Capability of CLIP" (2024).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# CLIP learned from short captions: its first positions are well trained, and stay what they are
KEPT = 20
FACTOR = 4

# the second table, in OpenAI's layout and in transformers'
_SECOND = re.compile(r"(.*)(positional_embedding|position_embedding)_res(\.weight)?")


def stretched_length(positions: int) -> int:
    """Return how many positions :func:`stretch_positions` makes: 248 of 77."""
    return KEPT + FACTOR * (positions - KEPT)


def stretch_positions(positions: Tensor) -> Tensor:
    """Stretch learned positions as Long-CLIP does: the first 20 stay, four take the place of each of the others.

    Args:
        positions: ``[L, W]``, L at least 22.

    Returns:
        ``[20 + 4·(L − 20), W]`` in the dtype of ``positions``: every fourth row behind the first 20 is one that came,
        those between lie on the line to the next, and the last three go on along that line.

    Raises:
        ValueError: ``positions`` has fewer rows.
    """
    if positions.shape[0] < KEPT + 2:
        raise ValueError(f"positions: got {positions.shape[0]} rows, expected at least {KEPT + 2} to stretch")
    exact = positions.to(torch.promote_types(positions.dtype, torch.float32))
    rest = exact[KEPT:]
    shares = torch.arange(FACTOR, dtype=exact.dtype, device=exact.device)[:, None]
    between = ((FACTOR - shares) * rest[:-1, None] + shares * rest[1:, None]) / FACTOR
    beyond = rest[-1] + shares * (rest[-1] - rest[-2]) / FACTOR
    return torch.cat([exact[:KEPT], between.flatten(0, 1), beyond]).to(positions.dtype)


def with_one_table(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join Long-CLIP's two tables of text positions to the one that they amount to.

    Long-CLIP adds the rows of the first table for the first 20 positions and those of the second for the others,
    by two masks, which some checkpoints hold as well. State dicts without a second table are returned as they are.

    Raises:
        ValueError: The first table or one mask is missing, or shapes differ.
    """
    joined = dict(state)
    for key in state:
        found = _SECOND.fullmatch(key)
        if found is None:
            continue
        before, name, after = found[1], found[2], found[3] or ""
        first = next((k for k in (f"{before}{name}{after}", f"{before}{name}_ori{after}") if k in state), None)
        if first is None or state[first].shape != state[key].shape or state[key].dim() != 2:
            came = "none" if first is None else f"{first} {tuple(state[first].shape)}"
            raise ValueError(
                f"state dict: got {came} beside Long-CLIP's {key} {tuple(state[key].shape)}, expected a first table of "
                f"the same shape"
            )
        masks = [joined.pop(before + mask, None) for mask in ("mask1", "mask2")]
        joined[f"{before}{name}{after}"] = _join(joined.pop(first), joined.pop(key), masks)
    return joined


def _join(first: Tensor, second: Tensor, masks: list[Tensor | None]) -> Tensor:
    if all(mask is None for mask in masks):
        return torch.cat([first[:KEPT], second[KEPT:]])
    shapes = [None if mask is None else tuple(mask.shape) for mask in masks]
    if shapes != [(first.shape[0], 1)] * 2:
        raise ValueError(f"state dict: got Long-CLIP's masks of shapes {shapes}, expected {(first.shape[0], 1)} twice")
    return first * masks[0].to(first.dtype) + second * masks[1].to(first.dtype)
