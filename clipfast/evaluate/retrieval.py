"""Image-to-text and text-to-image retrieval."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.evaluate.names import chance_name, recall_name
from clipfast.evaluate.ranking import ranks_of_right


def retrieval_recall(
    image_features: Tensor,
    text_features: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    *,
    image_of_text: Tensor | None = None,
) -> dict[str, float]:
    """Measure how often the right partner is among the k nearest, in both directions.

    A query is right at k where one of its partners is among the k best, as clip-benchmark counts. Of candidates that
    score the same the one of the lower index goes first (:mod:`clipfast.evaluate.ranking`): features that are all the
    same come out at chance.

    Args:
        image_features: ``[N, D]``, floating point; they are normalised here.
        text_features: ``[M, D]``.
        ks: How many of the nearest count; a ``k`` of all candidates or more gives 1.
        image_of_text: int64 ``[M]``, the index of each text's image, where images have any number of texts (images
            without one are candidates but no queries). None pairs text i with image i.

    Returns:
        For each k ``image_to_text_r{k}`` and ``text_to_image_r{k}``, recalls in [0, 1], and
        ``image_to_text_chance{k}`` and ``text_to_image_chance{k}``, what a random order is expected to reach. An
        image with several texts is right when one of them is among the k (as in Karpathy & Fei-Fei, 2015).

    Raises:
        ValueError: Shapes or indices that do not fit, features that are not finite, no pairs, or a k below 1.
    """
    images, texts = _unit_features(image_features, "image_features"), _unit_features(text_features, "text_features")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(f"text_features: got width {texts.shape[1]}, expected {images.shape[1]}, that of the images")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks: got {tuple(ks)}, expected numbers from 1 up")
    image_of_text = _pairing(image_of_text, len(images), len(texts), texts.device)
    texts_per_image = torch.bincount(image_of_text, minlength=len(images))
    queries = texts_per_image.nonzero().flatten()
    text_ids = torch.arange(len(images), device=images.device)

    ranks = {
        "image_to_text": ranks_of_right(images[queries], texts, text_ids[queries], image_of_text),
        "text_to_image": ranks_of_right(texts, images, image_of_text, text_ids),
    }
    right = {"image_to_text": texts_per_image[queries].tolist(), "text_to_image": [1] * len(texts)}
    candidates = {"image_to_text": len(texts), "text_to_image": len(images)}
    result = {}
    for direction, rank in ranks.items():
        for k in ks:
            result[recall_name(direction, k)] = (rank <= k).double().mean().item()
        for k in ks:
            chances = [_chance(k, m, candidates[direction]) for m in right[direction]]
            result[chance_name(recall_name(direction, k))] = sum(chances) / len(chances)
    return result


def _unit_features(features: Tensor, name: str) -> Tensor:
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"{name}: got {features.dtype} {tuple(features.shape)}, expected floating point [N, D]")
    if not len(features):
        raise ValueError(f"{name}: got no rows, expected at least one")
    if not features.isfinite().all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite features")
    return F.normalize(features.detach().to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def _pairing(image_of_text: Tensor | None, images: int, texts: int, device: torch.device) -> Tensor:
    if image_of_text is None:
        if images != texts:
            raise ValueError(f"text_features: got {texts} texts for {images} images; pass image_of_text")
        return torch.arange(texts, device=device)
    if image_of_text.shape != (texts,) or image_of_text.is_floating_point():
        raise ValueError(
            f"image_of_text: got {image_of_text.dtype} {tuple(image_of_text.shape)}, expected integers [{texts}]"
        )
    if image_of_text.min() < 0 or image_of_text.max() >= images:
        low, high = image_of_text.min().item(), image_of_text.max().item()
        raise ValueError(f"image_of_text: got indices {low} to {high}, expected 0 to {images - 1}")
    return image_of_text.to(device)


def _chance(k: int, right: int, candidates: int) -> float:
    """The probability that one of ``right`` candidates is among the first k of a random order of all."""
    if k >= candidates:
        return 1.0
    return 1 - math.comb(candidates - right, k) / math.comb(candidates, k)
