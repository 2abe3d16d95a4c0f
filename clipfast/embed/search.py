"""What ``clipfast search`` does: the rows of a file of features that are nearest to a text or a picture."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from clipfast.console import visible
from clipfast.data.model_inputs import picture_loader, tokenizer_of
from clipfast.data.options import DataOptions
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.data.transform import load_image
from clipfast.embed.feature_files import open_features
from clipfast.embed.writer import read_about
from clipfast.evaluate.features import picture_encoder, text_encoder
from clipfast.evaluate.probabilities import Sigmoid, sigmoid_of
from clipfast.models.clip import CLIP
from clipfast.models.open_model import weights_digest

# Features held at a time: 64 MiB of float32, whatever the number of rows.
_VALUES_IN_MEMORY = 1 << 24


@dataclass(frozen=True)
class Hit:
    """One of the nearest.

    Attributes:
        rank: From 1.
        cosine: With the query.
        row: Its number in what was embedded.
        name: Its path or text; empty if the file has no names.
        probability: That it and the query belong together, where a sigmoid says so.
        caption: What the data says of it, a line for each caption; None where the file has none.
    """

    rank: int
    cosine: float
    row: int
    name: str
    probability: float | None = None
    caption: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what there is, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def encode_query(
    model: CLIP,
    *,
    text: str | None = None,
    image: str | os.PathLike[str] | None = None,
    options: DataOptions | None = None,
    tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None,
) -> Tensor:
    """Return the features of a text or of a picture's file, ``[E]``; ``options`` say how the picture is read.

    ``tokenizer`` reads the text: one, or what :meth:`clipfast.Tokenizer.from_file` reads; CLIP's by default.

    Raises:
        ValueError: Neither is given, both are, or the text is empty.
        ImageError, OSError: The picture cannot be read.
    """
    if (text is None) == (image is None):
        raise ValueError(f"text, image: got {'neither' if text is None else 'both'}, expected one of them")
    if image is not None:
        encoder, item = picture_encoder(model), picture_loader(model, options)(load_image(image))
    elif text.strip():
        encoder, item = text_encoder(model, tokenizer), text
    else:
        raise ValueError("text: got an empty one, expected words")
    return encoder.encode(encoder.collate([item]))[0].detach().float().cpu()


def search(
    features: str | os.PathLike[str],
    query: Tensor,
    k: int = 10,
    *,
    sigmoid: Sigmoid | None = None,
    chunk_values: int = _VALUES_IN_MEMORY,
) -> list[Hit]:
    """Find the k rows whose features have the largest cosine with a query's, of equals the first.

    The file is mapped into memory and read a chunk at a time.

    Args:
        features: A ``.parquet`` or ``.npy`` file of :func:`clipfast.embed.embed.embed`; or any ``.npy`` array
            ``[n, E]``, or Parquet with a column ``features`` of lists, of other programs.
        query: ``[E]``, of any length but 0.
        k: How many; all where there are fewer.
        sigmoid: What makes probabilities of cosines; see :func:`sigmoid_for`.
        chunk_values: The most values read at once.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: pyarrow is missing, for Parquet.
        ValueError: The file is damaged or lacks the column, widths differ, features or the query are not finite, or
            ``k`` is not positive.
    """
    path = Path(features)
    if k < 1:
        raise ValueError(f"k: got {k}, expected at least 1")
    if query.dim() != 1 or not query.isfinite().all() or not query.any():
        raise ValueError(f"query: got {tuple(query.shape)}, expected [E], finite and not all zero")
    unit = query.detach().double().numpy()
    unit /= np.linalg.norm(unit)
    file = open_features(path)
    if file.width != len(unit):
        raise ValueError(f"features: got width {file.width} in {path}, expected {len(unit)}, that of the query's model")
    best_scores, best_places = np.empty(0), np.empty(0, np.int64)
    first = 0
    for chunk in file.chunks(max(1, chunk_values // file.width)):
        chunk = chunk.astype(np.float32, copy=False)
        if not np.isfinite(chunk).all():
            wrong = first + int(np.flatnonzero(~np.isfinite(chunk).all(axis=1))[0])
            raise ValueError(f"features: got NaN or infinity at place {wrong} of {path}, expected finite features")
        norms = np.sqrt(np.einsum("nd,nd->n", chunk, chunk, dtype=np.float64))
        scores = (chunk @ unit.astype(np.float32)).astype(np.float64) / np.maximum(norms, 1e-30)
        scores = np.concatenate([best_scores, scores])
        places = np.concatenate([best_places, np.arange(first, first + len(chunk))])
        order = np.lexsort((places, -scores))[:k] if len(scores) <= 4 * k else _first(scores, places, k)
        best_scores, best_places = scores[order], places[order]
        first += len(chunk)
    named = file.names(best_places.tolist())
    cosines = torch.from_numpy(best_scores)
    probabilities = [None] * len(cosines) if sigmoid is None else sigmoid(cosines).tolist()
    return [
        Hit(
            rank,
            float(best_scores[rank - 1]),
            named[place].row,
            named[place].name,
            probabilities[rank - 1],
            named[place].caption,
        )
        for rank, place in enumerate(best_places.tolist(), 1)
    ]


def sigmoid_for(features: str | os.PathLike[str], model: CLIP, *, text: bool) -> Sigmoid | None:
    """Return the sigmoid of a model where it was trained to tell: between texts and pictures.

    Args:
        features: The file, which says what it holds.
        model: That it was made with.
        text: Whether the query is a text.
    """
    kind = read_about(Path(features)).get("kind")
    return sigmoid_of(model) if kind == ("image" if text else "text") else None


def check_model(
    features: str | os.PathLike[str], model: CLIP, tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None
) -> None:
    """Raise ValueError if a file says that its features are of another model's weights or another tokenizer."""
    about = read_about(Path(features))
    if "tokenizer" in about and tokenizer_of(model, tokenizer).identity != about["tokenizer"]:
        raise ValueError(
            f"tokenizer: got another than that which {os.fspath(features)} was made with, expected the same"
        )
    digest = about.get("weights")
    if digest is not None and digest != weights_digest(model.state_dict()):
        raise ValueError(
            f"model: got other weights than those that {os.fspath(features)} was made with, expected the same"
        )


def model_of(features: str | os.PathLike[str]) -> dict[str, str]:
    """Return where a file says that its model lies: ``spec`` and perhaps ``weights`` and ``tokenizer``.

    Raises:
        ValueError: It does not say.
    """
    found = read_about(Path(features)).get("model")
    if not isinstance(found, dict):
        raise ValueError(
            f"model: got none, expected --model: {os.fspath(features)} does not say which it was made with"
        )
    return found


def picture_options_of(features: str | os.PathLike[str]) -> DataOptions:
    """Return how the pictures were read that a file of features is of; the usual way for files of other programs."""
    about = read_about(Path(features))
    return DataOptions(**{name: bool(about.get(name, False)) for name in DataOptions().of_pictures()})


def hits_table(hits: list[Hit], query: str) -> Table:
    """Set what was found as a table for the terminal."""
    probable = any(hit.probability is not None for hit in hits)
    captioned = any(hit.caption for hit in hits)
    numbers = ("rank", "cosine", *(("probability",) if probable else ()), "row")
    words = ("name", *(("caption",) if captioned else ()))
    table = Table(*numbers, *words, title=visible(query), title_justify="left")
    for column in table.columns[: len(numbers)]:
        column.justify = "right"
    for hit in hits:
        chance = [f"{hit.probability:.3g}"] if probable else []
        caption = [_shortly(hit.caption)] if captioned else []
        table.add_row(str(hit.rank), f"{hit.cosine:.4f}", *chance, str(hit.row), visible(hit.name), *caption)
    return table


def _shortly(caption: str | None) -> str:
    """Return the first of several captions, and how many more there are."""
    first, *others = (caption or "").split("\n")
    return visible(first) + (f" (and {len(others)} more)" if others else "")


def meaning_of_scores(features: str | os.PathLike[str], hits: list[Hit], *, text: bool) -> str:
    """Say in a line what the numbers of hits mean: the nearest need not be near.

    Args:
        features: The file, which says what it holds.
        hits: What was found there.
        text: Whether the query is a text.
    """
    if any(hit.probability is not None for hit in hits):
        return "probability: by the model's sigmoid, of each pair by itself; the nearest may be improbable"
    kind = read_about(Path(features)).get("kind")
    if kind == ("image" if text else "text"):
        return (
            "cosine: says what is nearest, not that it fits; OpenAI's models give a picture and a text that fit about "
            "0.25 to 0.35, and others 0.1 to 0.2"
        )
    return "cosine: 1 is the same direction; the nearest need not be near"


def _first(scores: np.ndarray, places: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, in order, of equals the first place; without sorting the others."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= least)
    return candidates[np.lexsort((places[candidates], -scores[candidates]))[:k]]
