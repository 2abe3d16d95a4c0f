"""What ``clipfast search`` does: the rows of a file of features that are nearest to a text or a picture."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from clipfast.console import visible
from clipfast.data.model_inputs import picture_loader, tokenizer_of
from clipfast.data.options import DataOptions
from clipfast.data.parquet import find_column, open_parquet
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.data.transform import load_image
from clipfast.embed.writer import names_path, read_about
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
    """

    rank: int
    cosine: float
    row: int
    name: str
    probability: float | None = None

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
    file = _open(path)
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
        Hit(rank, float(best_scores[rank - 1]), *named[place], probability=probabilities[rank - 1])
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
    heads = ("rank", "cosine", *(("probability",) if probable else ()), "row", "name")
    table = Table(*heads, title=visible(query), title_justify="left")
    for column in table.columns[:-1]:
        column.justify = "right"
    for hit in hits:
        chance = [f"{hit.probability:.3g}"] if probable else []
        table.add_row(str(hit.rank), f"{hit.cosine:.4f}", *chance, str(hit.row), visible(hit.name))
    return table


def _first(scores: np.ndarray, places: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest, in order, of equals the first place; without sorting the others."""
    least = np.partition(scores, len(scores) - k)[len(scores) - k]
    candidates = np.flatnonzero(scores >= least)
    return candidates[np.lexsort((places[candidates], -scores[candidates]))[:k]]


class _Array:
    """An ``.npy`` array, and the names beside it."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"features: got {path}, expected a file: there is none")
        try:
            self._values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise ValueError(f"features: got {path}, expected a whole .npy array: {error}") from error
        if self._values.ndim != 2 or self._values.dtype.kind != "f" or not self._values.size:
            raise ValueError(
                f"features: got {self._values.dtype} {self._values.shape} in {path}, expected floats [n, E]"
            )
        self._path = path
        self.width = self._values.shape[1]

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        for first in range(0, len(self._values), rows):
            yield np.array(self._values[first : first + rows])

    def names(self, places: list[int]) -> dict[int, tuple[int, str]]:
        beside = names_path(self._path)
        if not beside.is_file():
            return {place: (place, "") for place in places}
        wanted = set(places)
        with beside.open(encoding="utf-8") as file:
            lines = islice(file, 1, None)  # the first says what the features depend on
            return {place: tuple(json.loads(line)) for place, line in enumerate(lines) if place in wanted}


class _Table:
    """A Parquet file with a column of features."""

    def __init__(self, path: Path) -> None:
        self._file = open_parquet(path)
        import pyarrow.types as types

        schema = self._file.schema_arrow
        find_column(schema.names, "features", (), path)
        kind = schema.field("features").type
        if not (types.is_fixed_size_list(kind) or types.is_list(kind)) or not types.is_floating(kind.value_type):
            raise ValueError(f"features: got a column of {kind} in {path}, expected lists of floats")
        if not self._file.metadata.num_rows:
            raise ValueError(f"features: got no rows in {path}, expected at least one")
        self._path = path
        self._columns = [name for name in ("row", "path", "text") if name in schema.names]
        self.width = kind.list_size if types.is_fixed_size_list(kind) else self._first_width()

    def _first_width(self) -> int:
        return len(next(self._batches(1, ["features"]))[0][0])

    def _batches(self, rows: int, columns: list[str]) -> Iterator[Any]:
        yield from self._file.iter_batches(batch_size=rows, columns=columns)

    def chunks(self, rows: int) -> Iterator[np.ndarray]:
        for batch in self._batches(rows, ["features"]):
            column = batch.column(0)
            flat = column.flatten().to_numpy(zero_copy_only=False)
            if column.null_count or len(flat) != len(column) * self.width:
                raise ValueError(f"features: got rows in {self._path} that are not of width {self.width}")
            yield flat.reshape(-1, self.width)

    def names(self, places: list[int]) -> dict[int, tuple[int, str]]:
        if not self._columns:
            return {place: (place, "") for place in places}
        wanted, found, first = sorted(places), {}, 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            here = [place for place in wanted if first <= place < first + count]
            if here:
                table = self._file.read_row_group(group, columns=self._columns)
                for place in here:
                    values = {name: table.column(name)[place - first].as_py() for name in self._columns}
                    found[place] = (values.get("row", place), values.get("path") or values.get("text") or "")
            first += count
        return found


def _open(path: Path) -> _Array | _Table:
    if path.suffix == ".npy":
        return _Array(path)
    if path.suffix == ".parquet":
        return _Table(path)
    raise ValueError(f"features: got {path}, expected a .npy or .parquet file")
