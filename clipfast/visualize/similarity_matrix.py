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

from clipfast.visualize.figures import BLUE, add_colour_bar, hide_frame, new_figure

# The logits that a softmax model's colours begin and end with. OpenAI's notebook draws cosines of 0.1 to 0.3, at a
# logit scale of 100; pairs that fit reach 0.35.
_LOGITS = (10.0, 35.0)

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


def cosine_range(logit_scale: float) -> tuple[float, float]:
    """Return the cosines that the colours of a softmax model begin and end with, whatever the pictures are.

    They are 0.1 and 0.35 for a model of OpenAI's logit scale, 100: there pictures and texts that fit have 0.25 to 0.35,
    and others 0.1 to 0.2. At another scale they are those of the same logits, within the cosine of 1.

    Args:
        logit_scale: The factor between cosines and logits.
    """
    low, high = _LOGITS
    end = min(1.0, high / logit_scale)
    return end * low / high, end


def shares_of_texts(cosines: Tensor, logit_scale: float) -> Tensor:
    """Return what the softmax of a model makes of the texts beside each other: each column sums to 1.

    Args:
        cosines: ``[texts, images]``.
        logit_scale: The factor between cosines and logits.
    """
    return (logit_scale * cosines.double()).softmax(dim=0)


def plot_similarity_matrix(
    cosines: Tensor,
    texts: Sequence[str],
    pictures: Sequence[np.ndarray],
    probabilities: Tensor | None = None,
    *,
    logit_scale: float = 100.0,
) -> Figure:
    """Plot how texts fit pictures as a heat map, texts at the left and pictures above, as OpenAI's notebook does.

    Colours have a range of their own, which no picture or text changes: that of :func:`cosine_range`, or 0 to 1 for
    probabilities. A picture that no text fits is dark. In each column the best of several texts is framed, and below
    its cosine a cell has its share among these texts.

    Args:
        cosines: ``[texts, images]`` of :func:`similarity_matrix`.
        texts: One a row; long ones are cut short.
        pictures: One a column, each uint8 ``[H, W, 3]``, of any size.
        probabilities: ``[texts, images]``, drawn in the place of cosines.
        logit_scale: Of a model that learned by a softmax.

    Raises:
        ValueError: The numbers do not fit, or there is nothing to plot.
    """
    if cosines.shape != (len(texts), len(pictures)) or not cosines.numel():
        raise ValueError(
            f"cosines: got {tuple(cosines.shape)}, expected [{len(texts)}, {len(pictures)}], one for each text and "
            f"picture, and at least one of each"
        )
    values = (cosines if probabilities is None else probabilities).detach().float().cpu().numpy()
    labels = [_short(text) for text in texts]
    several = len(texts) > 1
    if probabilities is None:
        low, high = cosine_range(logit_scale)
        written = [[f"{value:.2f}" for value in row] for row in values]
        if several:
            shares = shares_of_texts(cosines.detach().cpu(), logit_scale).tolist()
            pairs = (zip(*rows, strict=True) for rows in zip(written, shares, strict=True))
            written = [[f"{cosine}\n{_of_share(share)}" for cosine, share in row] for row in pairs]
        label = "cosine"
    else:
        low, high, label = 0.0, 1.0, "probability"
        written = [[_of_probability(value) for value in row] for row in probabilities.tolist()]
    rows, columns = values.shape
    lines = sum(words.count("\n") + 1 for words in labels)
    width = 2.9 + _CELL * columns
    cell = 0.4 if several and probabilities is None else 0.32
    height = 0.3 + _CELL + max(cell * rows, 0.19 * lines + 0.12 * rows, 1.1)
    figure, panels = new_figure(width, height)
    axes = panels[0, 0]
    hide_frame(axes)
    drawn = axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto")
    add_colour_bar(figure, axes, drawn, label, open_ended=probabilities is None)
    axes.set_yticks(range(rows), labels, fontsize=8)
    axes.tick_params(length=0)
    for row in range(rows):
        for column in range(columns):
            # viridis is dark below and light above
            ink = "white" if values[row, column] < low + 0.6 * (high - low) else "black"
            axes.text(column, row, written[row][column], ha="center", va="center", fontsize=8, color=ink)
    for column, best in enumerate(cosines.argmax(dim=0).tolist() if several else ()):
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


def similarity_words(texts: int, logit_scale: float | None) -> str:
    """Say what the numbers and colours of :func:`plot_similarity_matrix` mean.

    Args:
        texts: How many there are.
        logit_scale: Of a model that learned by a softmax; None where there are probabilities.
    """
    best = " The best text of each picture is framed: the best of these, which need not fit." if texts > 1 else ""
    if logit_scale is None:
        return (
            "How probable it is that each text fits each picture, by the model's sigmoid: of each pair by itself, on a "
            f"scale from 0 to 1.{best}"
        )
    low, high = cosine_range(logit_scale)
    share = (
        " Below it is the text's share among these texts, by the model's softmax: the shares of a picture sum to 100% "
        "also where no text fits."
        if texts > 1
        else ""
    )
    return (
        f"Cosine similarities, in colours from {low:.2f} to {high:.2f} whatever the pictures and texts are, so that a "
        f"weak match looks weak. Of OpenAI's models, whose logit scale is 100, the colours go from 0.10 to 0.35: "
        f"pictures and texts that fit have about 0.25 to 0.35 there, and others 0.1 to 0.2. This model's scale is "
        f"{logit_scale:.1f}, and its colours begin and end at the same logits, within a cosine of 1.{share}{best} A "
        f"model that learned by a softmax compares texts; it knows no probability of one by itself. To judge its "
        f"cosines, add a text that is known to fit and one that is known not to."
    )


def _frame(column: int, row: int) -> tuple[list[float], list[float]]:
    left, right, top, bottom = column - 0.47, column + 0.47, row - 0.46, row + 0.46
    return [left, right, right, left, left], [top, top, bottom, bottom, top]


def _of_probability(value: float) -> str:
    """Write a share so that small ones can be told apart: ``99.1%``, ``3e-05``."""
    return f"{value:.1%}" if value >= 0.001 else f"{value:.0e}"


def _of_share(value: float) -> str:
    return "<1%" if 0 < value < 0.005 else f"{value:.0%}"


def _short(text: str) -> str:
    return textwrap.fill(textwrap.shorten(text, 72, placeholder="…") or text[:72], 36)


def _thumbnail(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    return np.asarray(image)
