"""Pictures with the captions a model finds nearest, right ones marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from clipfast.visualize.figures import picture_uri


@dataclass(frozen=True)
class Retrieval:
    """What a model found for one picture.

    Attributes:
        nearest: Indices of the captions, the nearest first.
        cosines: Of these captions with the picture.
        rank: The place of the right caption among all, from 1; equals in score are before it.
    """

    nearest: list[int]
    cosines: list[float]
    rank: int


def nearest_captions(
    image_features: Tensor, text_features: Tensor, queries: Sequence[int], k: int = 5
) -> list[Retrieval]:
    """Find the k captions nearest to some of N pictures, among all N captions.

    Args:
        image_features: ``[N, D]``.
        text_features: ``[N, D]``; row i is right for picture i.
        queries: Indices of the pictures.
        k: How many captions, at most all.
    """
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    found = []
    for query in queries:
        cosines = texts @ images[query]
        # of equals the first goes first; topk leaves their order open
        values, order = cosines.sort(descending=True, stable=True)
        rank = int((cosines >= cosines[query]).sum())
        found.append(Retrieval(order[:k].tolist(), values[:k].tolist(), rank))
    return found


def retrieval_sheet(
    pictures: np.ndarray, captions: Sequence[str], queries: Sequence[int], retrievals: Sequence[Retrieval]
) -> str:
    """Set retrievals as HTML, one card a picture, for :class:`clipfast.visualize.report.Report`.

    Args:
        pictures: uint8 ``[N, H, W, 3]``.
        captions: N captions; caption i is right for picture i.
        queries: Indices of the pictures to show.
        retrievals: Of :func:`nearest_captions` for the same queries.
    """
    cards = [
        _card(pictures[query], captions, query, retrieval) for query, retrieval in zip(queries, retrievals, strict=True)
    ]
    return f'<div class="cards">{"".join(cards)}</div>'


def _card(picture: np.ndarray, captions: Sequence[str], query: int, retrieval: Retrieval) -> str:
    rows = []
    for index, cosine in zip(retrieval.nearest, retrieval.cosines, strict=True):
        mark = ' class="right"' if index == query else ""
        rows.append(f"<li{mark}><span>{escape(captions[index])}</span> <small>{cosine:.2f}</small></li>")
    missed = ""
    if query not in retrieval.nearest:
        missed = f'<p class="missed">right: {escape(captions[query])} <small>rank {retrieval.rank}</small></p>'
    return (
        f'<figure class="card"><img src="{picture_uri(picture)}" alt="{escape(captions[query])}">'
        f"<figcaption><ol>{''.join(rows)}</ol>{missed}</figcaption></figure>"
    )
