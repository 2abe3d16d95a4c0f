"""Pictures and captions in the space they share, flattened to two dimensions."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from PIL import Image, ImageFilter
from sklearn.manifold import TSNE
from torch import Tensor

from clipfast.extras import missing
from clipfast.visualize.figures import BLUE, GREY, INK, ORANGE, hide_frame, new_figure

#: What can lay features out in a plane, and what it is called.
METHODS = {"tsne": "t-SNE", "umap": "UMAP"}
# points a side of a picture, where there are many and where there are few
_MANY, _SIDES = 40, (19.2, 42.0)


def project_features(
    image_features: Tensor,
    text_features: Tensor,
    *,
    center: bool = True,
    perplexity: float = 20.0,
    seed: int = 0,
    method: str = "tsne",
) -> tuple[np.ndarray, np.ndarray]:
    """Lay N pairs out in a plane by t-SNE (van der Maaten & Hinton, 2008) on cosine distances, or by UMAP.

    Args:
        image_features: ``[N, D]``.
        text_features: ``[N, D]``.
        center: Whether each modality's mean is taken out first. CLIP keeps pictures and texts in two separate cones
            (the modality gap: Liang et al., 2022); with the gap in, t-SNE shows little but two clouds.
        perplexity: How many neighbours each point looks at; fewer for fewer pairs.
        seed: Of the layout.
        method: ``"tsne"``, or ``"umap"`` (McInnes et al., 2018) where umap-learn is installed.

    Returns:
        float32 ``[N, 2]`` for images and for texts.

    Raises:
        ImportError: ``method`` is "umap" and umap-learn is missing.
        ValueError: Shapes differ, fewer than three pairs, features that are not finite, or another ``method``.
    """
    require_method(method)
    if image_features.shape != text_features.shape or image_features.dim() != 2 or len(image_features) < 3:
        raise ValueError(
            f"image_features, text_features: got {tuple(image_features.shape)} and {tuple(text_features.shape)}, "
            f"expected both [N, D] with at least 3 pairs"
        )
    images, texts = (_unit_rows(f.detach().float().cpu().numpy(), center) for f in (image_features, text_features))
    points = np.concatenate([images, texts])
    if not np.isfinite(points).all():
        raise ValueError("image_features, text_features: got NaN or infinity, expected finite features")
    neighbours = min(perplexity, (len(points) - 1) / 3)
    if method == "umap":
        plane = _umap(points, max(2, round(neighbours)), seed)
    else:
        tsne = TSNE(perplexity=neighbours, metric="cosine", init="pca", random_state=seed)
        plane = tsne.fit_transform(points)
    return plane[: len(images)], plane[len(images) :]


def plot_feature_space(
    image_points: np.ndarray,
    text_points: np.ndarray,
    pictures: np.ndarray | None = None,
    texts: Sequence[str] | None = None,
) -> Figure:
    """Plot N pairs, each picture (blue) joined with its caption (orange): short lines found each other.

    Args:
        image_points: ``[N, 2]`` of :func:`project_features`.
        text_points: ``[N, 2]``.
        pictures: uint8 ``[N, H, W, 3]`` drawn in the place of the blue dots.
        texts: N captions written beside the orange dots.
    """
    figure, panels = new_figure(6.0, 6.0)
    axes = panels[0, 0]
    hide_frame(axes)
    axes.add_collection(LineCollection(np.stack([image_points, text_points], axis=1), colors=GREY, linewidths=0.7))
    axes.plot(*text_points.T, ".", color=ORANGE, markersize=4)
    for point, text in zip(text_points, texts or (), strict=False):
        words = textwrap.fill(textwrap.shorten(text, 48, placeholder="…") or text[:48], 26)
        axes.annotate(words, point, (4, 0), textcoords="offset points", fontsize=7, color=INK, va="center")
    if pictures is None:
        axes.plot(*image_points.T, ".", color=BLUE, markersize=4)
    else:
        side = _SIDES[len(pictures) < _MANY]
        for point, picture in zip(image_points, pictures, strict=True):
            axes.add_artist(
                AnnotationBbox(OffsetImage(_cut_out(picture), zoom=side / picture.shape[0]), point, frameon=False)
            )
        axes.update_datalim(image_points)
        axes.autoscale_view()
    return figure


def require_method(method: str) -> None:
    """Find out whether :func:`project_features` can use a method.

    Raises:
        ImportError: It is "umap", and umap-learn is missing.
        ValueError: There is no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected {' or '.join(map(repr, METHODS))}")
    if method == "umap":
        _load_umap()


def _load_umap() -> Any:
    try:
        from umap import UMAP
    except ImportError as error:
        raise missing("method: 'umap' needs", "umap") from error
    return UMAP


def _umap(points: np.ndarray, neighbours: int, seed: int) -> np.ndarray:
    return _load_umap()(n_neighbors=neighbours, metric="cosine", random_state=seed).fit_transform(points)


def _unit_rows(features: np.ndarray, center: bool) -> np.ndarray:
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    if center:
        features = features - features.mean(axis=0)
        features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return features


def _cut_out(picture: np.ndarray) -> np.ndarray:
    """Make a drawing's white background see-through but for a rim, so that neighbours show and dark pages do not."""
    drawn = Image.fromarray(255 * (picture < 250).any(axis=-1).astype(np.uint8))
    return np.dstack([picture, np.asarray(drawn.filter(ImageFilter.MaxFilter(5)))])
