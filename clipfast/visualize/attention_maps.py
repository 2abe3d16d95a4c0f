"""Where a vision transformer looks, laid over the picture it looks at."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from clipfast.visualize.figures import hide_frame, new_figure


def attention_rollout(attention: Tensor) -> Tensor:
    """Follow attention from the class token through all blocks down to the patches.

    Heads are averaged, and half of every token is taken to stay where it is, for the residual connection; the
    blocks' matrices are multiplied (attention rollout: Abnar & Zuidema, 2020).

    Args:
        attention: ``[layers, B, heads, N, N]`` (query, key), as :meth:`clipfast.ViT.get_attention_maps` gives it,
            the class token first.

    Returns:
        float32 ``[B, N - 1]``, each patch's share of what the class token has seen; a row sums to 1.

    Raises:
        ValueError: ``attention`` has another shape.
    """
    if attention.dim() != 5 or attention.shape[-1] != attention.shape[-2] or attention.shape[-1] < 2:
        raise ValueError(f"attention: got shape {tuple(attention.shape)}, expected [layers, B, heads, N, N]")
    blocks = attention.detach().float().mean(dim=2)
    blocks = 0.5 * blocks + 0.5 * torch.eye(blocks.shape[-1], device=blocks.device)
    flow = blocks[0]
    for block in blocks[1:]:
        flow = block @ flow
    patches = flow[:, 0, 1:]
    return patches / patches.sum(dim=-1, keepdim=True)


def plot_attention_maps(
    pictures: np.ndarray, shares: Tensor, grid: tuple[int, int], captions: Sequence[str] | None = None
) -> Figure:
    """Plot pictures, each beside itself with the patches' shares as a heat map.

    Args:
        pictures: uint8 ``[B, H, W, 3]``.
        shares: ``[B, N - 1]`` of :func:`attention_rollout`.
        grid: The patches' ``(rows, columns)``, ``ViT.grid_size``.
        captions: One a picture.

    Raises:
        ValueError: ``shares`` does not fit the pictures or the grid.
    """
    if shares.shape != (len(pictures), grid[0] * grid[1]):
        raise ValueError(
            f"shares: got shape {tuple(shares.shape)}, expected [{len(pictures)}, {grid[0]}·{grid[1]}], one share for "
            f"each picture and patch"
        )
    heat = F.interpolate(shares.detach().float().cpu().reshape(-1, 1, *grid), pictures.shape[1:3], mode="bicubic")
    columns = 4
    rows = -(-len(pictures) // (columns // 2))
    figure, panels = new_figure(5.0, 1.45 * rows, rows=rows, columns=columns)
    for axes in panels.flat:
        hide_frame(axes)
    pairs_of_axes = panels.reshape(-1, 2)
    for i, (picture, map_) in enumerate(zip(pictures, heat[:, 0].numpy(), strict=True)):
        plain, overlaid = pairs_of_axes[i]
        plain.imshow(picture)
        overlaid.imshow(picture.mean(axis=-1), cmap="gray", vmin=-160, vmax=255)
        # see-through where little attention goes
        opacity = 0.75 * np.clip((map_ - map_.min()) / max(np.ptp(map_), 1e-12), 0, 1)
        overlaid.imshow(map_, cmap="inferno", alpha=opacity)
        if captions is not None:
            plain.set_title(captions[i], fontsize=7, loc="left")
    return figure
