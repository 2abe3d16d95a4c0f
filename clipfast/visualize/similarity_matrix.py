"""Which text fits which picture, as a heat map."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image
from torch import Tensor

from clipfast.visualize.figures import BLUE, hide_frame, new_figure

# inches a picture's column takes
_CELL = 0.72
_THUMBNAIL = 96


def similarity_matrix(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Return the cosines of all texts with all images, float32 ``[texts, images]``.

    Args:
        image_features: ``[N, D]``.
        text_features: ``[M, D]``.

    Raises:
        ValueError: Widths differ, or features are not finite.
    """
    if image_features.dim() != 2 or text_features.dim() != 2 or image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"image_features, text_features: got {tuple(image_features.shape)} and {tuple(text_features.shape)}, "
            f"expected [N, D] and [M, D]"
        )
    if not (image_features.isfinite().all() and text_features.isfinite().all()):
        raise ValueError("image_features, text_features: got NaN or infinity, expected finite features")
    images, texts = (F.normalize(f.detach().float().cpu(), dim=-1) for f in (image_features, text_features))
    return texts @ images.T


def plot_similarity_matrix(
    cosines: Tensor, texts: Sequence[str], pictures: Sequence[np.ndarray], probabilities: Tensor | None = None
) -> Figure:
    """Plot cosines as a heat map, texts at the left and pictures above, as OpenAI's notebook does.

    In each column the best of several texts is framed.

    Args:
        cosines: ``[texts, images]`` of :func:`similarity_matrix`.
        texts: One a row; long ones are cut short.
        pictures: One a column, each uint8 ``[H, W, 3]``, of any size.
        probabilities: ``[texts, images]``, written into the cells in the place of cosines, which colour them.

    Raises:
        ValueError: The numbers do not fit, or there is nothing to plot.
    """
    if cosines.shape != (len(texts), len(pictures)) or not cosines.numel():
        raise ValueError(
            f"cosines: got {tuple(cosines.shape)}, expected [{len(texts)}, {len(pictures)}], one for each text and "
            f"picture, and at least one of each"
        )
    values = cosines.detach().float().cpu().numpy()
    labels = [_short(text) for text in texts]
    if probabilities is None:
        written = [[f"{value:.2f}" for value in row] for row in values]
    else:
        written = [[_of_probability(value) for value in row] for row in probabilities.tolist()]
    rows, columns = values.shape
    lines = sum(label.count("\n") + 1 for label in labels)
    width = 2.3 + _CELL * columns
    height = 0.3 + _CELL + max(0.32 * rows, 0.19 * lines + 0.12 * rows)
    figure, panels = new_figure(width, height)
    axes = panels[0, 0]
    hide_frame(axes)
    spread = max(float(np.ptp(values)), 1e-6)
    low, high = float(values.min()) - 0.15 * spread, float(values.max())
    axes.imshow(values, cmap="viridis", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
    axes.set_yticks(range(rows), labels, fontsize=8)
    axes.tick_params(length=0)
    for row in range(rows):
        for column in range(columns):
            # viridis is dark below and light above
            ink = "white" if values[row, column] < low + 0.6 * (high - low) else "black"
            axes.text(column, row, written[row][column], ha="center", va="center", fontsize=8, color=ink)
    for column, best in enumerate(values.argmax(axis=0) if rows > 1 else ()):
        axes.plot(*_frame(column, best), color="white", linewidth=2.4, clip_on=False)
        axes.plot(*_frame(column, best), color=BLUE, linewidth=1.2, clip_on=False)
    for column, picture in enumerate(pictures):
        thumbnail = _thumbnail(picture)
        image = OffsetImage(thumbnail, zoom=0.86 * 72 * _CELL / max(thumbnail.shape[:2]))
        above = {"xycoords": ("data", "axes fraction"), "box_alignment": (0.5, -0.06)}
        axes.add_artist(AnnotationBbox(image, (column, 1.0), frameon=False, pad=0, **above))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    return figure


def _frame(column: int, row: int) -> tuple[list[float], list[float]]:
    left, right, top, bottom = column - 0.47, column + 0.47, row - 0.46, row + 0.46
    return [left, right, right, left, left], [top, top, bottom, bottom, top]


def _of_probability(value: float) -> str:
    """Write a share so that small ones can be told apart: ``99.1%``, ``3e-05``."""
    return f"{value:.1%}" if value >= 0.001 else f"{value:.0e}"


def _short(text: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 72, placeholder="…") or text[:72], 36)


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(image)
