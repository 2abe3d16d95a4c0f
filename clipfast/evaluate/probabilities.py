"""What SigLIP's sigmoid makes of cosines: the probability that a picture and a text belong together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.evaluate.ranking import SCORES_IN_MEMORY
from clipfast.models.clip import CLIP


@dataclass(frozen=True)
class Sigmoid:
    """The probability that belongs to a cosine, ``sigmoid(scale * cosine + bias)``.

    Those of several texts need not add up to one. It grows with the cosine, so that every ranking stays as it is.

    Attributes:
        scale: The factor between cosines and logits.
        bias: What is added to logits.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
    """

    scale: float
    bias: float

    def __call__(self, cosines: Tensor) -> Tensor:
        """Return probabilities, of the shape of ``cosines``."""
        return torch.sigmoid(self.scale * cosines + self.bias)


def sigmoid_of(model: CLIP) -> Sigmoid | None:
    """Return the sigmoid that a model learned by; None for one without ``logit_bias``, which learned by a softmax."""
    if model.logit_bias is None:
        return None
    return Sigmoid(float(model.logit_scale.detach().float().exp()), float(model.logit_bias.detach()))


def mean_probabilities(
    image_features: Tensor, text_features: Tensor, image_ids: Tensor, text_ids: Tensor, sigmoid: Sigmoid
) -> dict[str, float]:
    """Measure how sure a model is of what is right and of what is wrong.

    Args:
        image_features: ``[N, D]``; their length does not matter.
        text_features: ``[M, D]``, likewise.
        image_ids: int64 ``[N]``.
        text_ids: int64 ``[M]``; a picture and a text of one id belong together.
        sigmoid: Of the model.

    Returns:
        ``probability_right`` and ``probability_wrong``, the means over all pairs that belong together and over all
        others; those of which there are any.
    """
    images, texts = (F.normalize(x.detach().float(), dim=-1) for x in (image_features, text_features))
    texts, text_ids = texts.to(images.device), text_ids.to(images.device)
    sums, counts = [0.0, 0.0], [0, 0]
    chunk = max(1, SCORES_IN_MEMORY // len(texts))
    for rows, ids in zip(images.split(chunk), image_ids.to(images.device).split(chunk), strict=True):
        probabilities = sigmoid(rows @ texts.T).double()
        right = ids[:, None] == text_ids
        for which, chosen in enumerate((right, ~right)):
            sums[which] += float((probabilities * chosen).sum())
            counts[which] += int(chosen.sum())
    names = ("probability_right", "probability_wrong")
    return {name: total / count for name, total, count in zip(names, sums, counts, strict=True) if count}
