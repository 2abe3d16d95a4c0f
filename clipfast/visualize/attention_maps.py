"""Where a vision transformer looks, laid over the picture it looks at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clipfast.visualize.figures import INK, hide_frame, new_figure


def attention_rollout(attention: Tensor, read: Tensor | None = None, prefix: int = 1) -> Tensor:
    """Follow attention from what the features are read from through all blocks down to the patches.

    Heads are averaged, and half of every token is taken to stay where it is, for the residual connection; the
    blocks' matrices are multiplied (attention rollout: Abnar & Zuidema, 2020).

    Args:
        attention: ``[layers, B, heads, N, N]`` (query, key), as :meth:`clipfast.ViT.get_attention_maps` gives it.
        read: ``[B, N]``, how much each token counts: the mean over heads of :meth:`clipfast.ViT.get_pool_weights`; by
            default the class token alone, which is the first.
        prefix: How many tokens lie before the patches, ``ViT.prefix_tokens``.

    Returns:
        float32 ``[B, N - prefix]``, each patch's share of what was seen; a row sums to 1.

    Raises:
        ValueError: ``attention`` or ``read`` has another shape.
    """
    _check(attention, read)
    blocks = attention.detach().float().mean(dim=2)
    blocks = 0.5 * blocks + 0.5 * torch.eye(blocks.shape[-1], device=blocks.device)
    flow = blocks[0]
    for block in blocks[1:]:
        flow = block @ flow
    patches = _read(flow[:, None], read)[:, 0, prefix:]
    return patches / patches.sum(dim=-1, keepdim=True)


def class_attention(attention: Tensor, block: int = -1, read: Tensor | None = None, prefix: int = 1) -> Tensor:
    """Return how much the class token, or what is read in its place, looks at each patch in one block, head by head.

    Args:
        attention: As for :func:`attention_rollout`.
        block: Its number; from the end if negative. The last is what the features are read from.
        read, prefix: As for :func:`attention_rollout`.

    Returns:
        float32 ``[B, heads, N - prefix]``; what is looked at before the patches is left out, so a row sums to 1 at
        most.

    Raises:
        ValueError: ``attention`` or ``read`` has another shape, or no such block.
    """
    _check(attention, read)
    if not -len(attention) <= block < len(attention):
        raise ValueError(f"block: got {block}, expected {-len(attention)} to {len(attention) - 1}")
    return _read(attention[block].detach().float(), read)[..., prefix:]


def _check(attention: Tensor, read: Tensor | None) -> None:
    if attention.dim() != 5 or attention.shape[-1] != attention.shape[-2] or attention.shape[-1] < 2:
        raise ValueError(f"attention: got shape {tuple(attention.shape)}, expected [layers, B, heads, N, N]")
    expected = (attention.shape[1], attention.shape[-1])
    if read is not None and tuple(read.shape) != expected:
        raise ValueError(f"read: got shape {tuple(read.shape)}, expected {list(expected)}, a weight for each token")


def _read(maps: Tensor, read: Tensor | None) -> Tensor:
    """Return ``[B, heads, N]``: of ``[B, heads, N, N]`` the class token's row, or rows by their weights."""
    return maps[:, :, 0] if read is None else torch.einsum("bn,bhnm->bhm", read.to(maps), maps)


def plot_attention_maps(
    pictures: np.ndarray, shares: Tensor, grid: tuple[int, int], captions: Sequence[str] | None = None
) -> Figure:
    """Plot pictures, each beside itself with the patches' shares as a heat map; a map that is nearly even looks even.

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
    heat = _heat(shares, grid, pictures.shape[1:3])
    columns = 4
    rows = -(-len(pictures) // (columns // 2))
    figure, panels = new_figure(5.0, 1.45 * rows, rows=rows, columns=columns)
    for axes in panels.flat:
        hide_frame(axes)
    pairs_of_axes = panels.reshape(-1, 2)
    for i, (picture, map_) in enumerate(zip(pictures, heat, strict=True)):
        plain, overlaid = pairs_of_axes[i]
        plain.imshow(picture)
        _overlay(overlaid, picture, map_, shares.shape[1])
        if captions is not None:
            plain.set_title(captions[i], fontsize=7, loc="left")
    return figure


def plot_heads(
    picture: np.ndarray, heads: Tensor, rollout: Tensor, grid: tuple[int, int], caption: str | None = None
) -> Figure:
    """Plot one picture, its rollout, the mean of the heads of a block, and every head, each with its own scale.

    Args:
        picture: uint8 ``[H, W, 3]``.
        heads: ``[heads, N - 1]``, one picture's of :func:`class_attention`.
        rollout: ``[N - 1]``, one picture's of :func:`attention_rollout`.
        grid: The patches' ``(rows, columns)``.
        caption: Of the picture.

    Raises:
        ValueError: ``heads`` or ``rollout`` does not fit the grid.
    """
    patches = grid[0] * grid[1]
    if heads.dim() != 2 or heads.shape[1] != patches or rollout.shape != (patches,):
        raise ValueError(
            f"heads, rollout: got {tuple(heads.shape)} and {tuple(rollout.shape)}, expected [heads, {patches}] and "
            f"[{patches}]"
        )
    maps = torch.cat([rollout[None].float().cpu(), heads.mean(dim=0, keepdim=True).cpu(), heads.cpu()])
    titles = ["rollout", "mean of the heads", *(f"head {i}" for i in range(len(heads)))]
    count = len(maps) + 1
    columns = min((6, 5), key=lambda columns: -count % columns)  # with the fewest empty places
    rows = -(-count // columns)
    height = (6.4 / columns + 0.14) * rows + (0.3 if caption else 0)
    figure, panels = new_figure(6.4, height, rows=rows, columns=columns)
    for axes in panels.flat:
        hide_frame(axes)
    first, *others = panels.flat
    first.imshow(picture)
    first.set_title("picture", fontsize=7, loc="left")
    for axes, title, map_ in zip(others, titles, _heat(maps, grid, picture.shape[:2]), strict=False):
        _overlay(axes, picture, map_, patches)
        axes.set_title(title, fontsize=7, loc="left")
    if caption:
        figure.suptitle(textwrap.shorten(caption, 90, placeholder="…"), fontsize=9, color=INK)
    return figure


def _heat(shares: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Spread ``[n, patches]`` over pictures: ``[n, H, W]``."""
    return F.interpolate(shares.detach().float().cpu().reshape(-1, 1, *grid), size, mode="bicubic")[:, 0].numpy()


def _overlay(axes: Axes, picture: np.ndarray, map_: np.ndarray, patches: int) -> None:
    axes.imshow(picture.mean(axis=-1), cmap="gray", vmin=-160, vmax=255)
    # a map that is nearly even looks even: less than what each patch has of an even one is not stretched to all colours
    low, spread = map_.min(), max(np.ptp(map_), 1 / patches)
    # see-through where little attention goes
    opacity = 0.75 * np.clip((map_ - low) / spread, 0, 1)
    axes.imshow(map_, cmap="inferno", vmin=low, vmax=low + spread, alpha=opacity)
