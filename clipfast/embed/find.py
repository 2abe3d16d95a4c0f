"""Searching from Python: what ``clipfast search`` does."""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor

from clipfast.data.model_inputs import model_and_tokenizer
from clipfast.data.pictures import is_picture
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.embed import search as searching
from clipfast.embed.feature_files import open_features
from clipfast.embed.search import Hit
from clipfast.models.clip import CLIP


def search(
    features: str | os.PathLike[str],
    query: str | Tensor | None = None,
    *,
    image: str | os.PathLike[str] | None = None,
    k: int = 10,
    model: CLIP | str | os.PathLike[str] | None = None,
    weights: str | os.PathLike[str] | None = None,
    tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None,
    device: str = "auto",
) -> list[Hit]:
    """Find the pictures or texts that are nearest to a text or a picture.

    A cosine says which is nearest, not that it fits: see :func:`clipfast.embed.search.meaning_of_scores`.

    Args:
        features: A file of :func:`clipfast.embed`, or as for :func:`clipfast.embed.search.search`.
        query: What to look for, in words; or features ``[E]``, which need no model.
        image: A picture's file to look for, in the place of words.
        k: How many; all where there are fewer.
        model: The one that made the features, or as for :func:`~clipfast.models.open_model.open_model`; by default what
            the file names.
        weights: As for :func:`~clipfast.models.open_model.open_model`.
        tokenizer: Of the model: one, or what :meth:`clipfast.Tokenizer.from_file` reads; by default what the file names
            or lies beside the model, else CLIP's.
        device: For :func:`~clipfast.models.open_model.find_device`.

    Returns:
        The k rows, nearest first.

    Raises:
        FileNotFoundError: There is no such file.
        TypeError: ``query`` is neither a text nor a Tensor.
        ValueError: Neither words nor a picture, both, or a picture's file as words; another model than that of the
            features; or as for :func:`clipfast.embed.search.search`.
    """
    if (query is None) == (image is None):
        raise ValueError(f"query, image: got {'neither' if query is None else 'both'}, expected one of them")
    if isinstance(query, Tensor):
        return searching.search(features, query, k)
    # what is wrong is told before a model is read
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    if query is not None and not isinstance(query, str):
        raise TypeError(f"query: got {type(query).__name__}, expected a text, or features as a Tensor")
    if query is not None and is_picture(query) and Path(query).is_file():
        raise ValueError(f"query: got {query}, which is a picture's file, expected words; --image {query} looks for it")
    open_features(Path(features))
    if model is None:
        where = searching.model_of(features)
        model, weights = where["spec"], weights or where.get("weights")
        tokenizer = tokenizer or where.get("tokenizer")
    clip, tokenizer = model_and_tokenizer(model, tokenizer, weights, device)
    searching.check_model(features, clip, tokenizer)
    options = searching.picture_options_of(features)
    vector = searching.encode_query(clip, text=query, image=image, options=options, tokenizer=tokenizer)
    sigmoid = searching.sigmoid_for(features, clip, text=query is not None)
    return searching.search(features, vector, k, sigmoid=sigmoid)
