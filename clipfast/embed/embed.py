"""What ``clipfast embed`` does: the features of many pictures or texts, in a file."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
from rich.console import Console

from clipfast.data.model_inputs import model_and_tokenizer, picture_loader, tokenizer_of
from clipfast.data.options import DataOptions
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.embed.reader import Inputs, open_inputs
from clipfast.embed.writer import (
    DTYPES,
    Part,
    PartStore,
    check_features_output,
    names_path,
    read_about,
    read_skipped,
    remove_run,
)
from clipfast.evaluate.features import Encoder, encode_rows, picture_encoder, text_encoder
from clipfast.models.clip import CLIP
from clipfast.models.open_model import weights_digest
from clipfast.progress import RowProgress


@dataclass(frozen=True)
class Embedding:
    """What a run of :func:`embed` came to.

    Attributes:
        output: The file.
        rows: How many it holds.
        computed: How many were computed by this run; the others were there.
        skipped: ``(row, name, reason)`` of those that could not be read.
    """

    output: Path
    rows: int
    computed: int
    skipped: list[tuple[int, str, str]]


def embed(
    model: CLIP | str | os.PathLike[str],
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    kind: Literal["image", "text"] = "image",
    column: str | None = None,
    options: DataOptions | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    normalize: bool = True,
    batch_size: int = 64,
    batches_per_part: int = 16,
    workers: int = 2,
    restart: bool = False,
    tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None,
    model_source: dict[str, str] | None = None,
    console: Console | None = None,
) -> Embedding:
    """Compute features and write them, in parts that a run after a kill takes over.

    Batches begin at fixed rows, and rows that cannot be read leave their places empty: on the same machine, a run
    that was killed and went on gives the bits of one that was not. While a batch is computed at most two are read.

    Args:
        model: In ``eval()``; or what :func:`~clipfast.models.open_model.open_model` opens: a run's folder, for one.
        source: For :func:`clipfast.embed.reader.open_inputs`.
        output: A ``.parquet`` file, with the columns ``row``, ``path`` (or ``text``) and ``features``; or an ``.npy``
            array ``[n, E]``, with ``row`` and name of each in the ``.names.jsonl`` beside it. Where pictures have
            captions, ``caption`` (of several, a line each) comes too. Rows that could not be read are left out, and
            listed in a ``.skipped.jsonl``.
        kind: ``"image"`` or ``"text"``.
        column: Of a table or of Parquet.
        options: What of the source is the picture and what the caption.
        dtype: Of the features in the file.
        normalize: Whether they get unit length.
        batch_size: Rows a batch.
        batches_per_part: What a kill loses at most.
        workers: Threads that read and decode.
        restart: Whether what an earlier run left is thrown away.
        tokenizer: Of the model, for texts: one, or what :meth:`clipfast.Tokenizer.from_file` reads; CLIP's by default.
        model_source: What :func:`clipfast.embed.search.model_of` shall give: ``spec`` and perhaps ``weights`` and
            ``tokenizer``.
        console: Where progress goes.

    Raises:
        FileNotFoundError, ImportError, OSError, ValueError: As its parts raise; an output of another model or source
            is there.
    """
    output = Path(output)
    check_features_output(output)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected 'float32' or 'float16'")
    if batch_size < 1 or batches_per_part < 1:
        raise ValueError(f"batch_size, batches_per_part: got {batch_size} and {batches_per_part}, expected at least 1")
    if model_source is None and isinstance(model, (str, os.PathLike)):
        model_source = {"spec": os.path.abspath(model) if os.path.exists(model) else os.fspath(model)}
    model, tokenizer = model_and_tokenizer(model, tokenizer)
    inputs = open_inputs(source, kind, column, options, model.config.vision_cfg.image_size)
    pictures = options if options is not None and inputs.kind == "image" else DataOptions()
    about = _about(model, inputs, dtype, normalize, batch_size, model_source) | _unusual(pictures)
    read_text = tokenizer_of(model, tokenizer) if inputs.kind == "text" else None
    if read_text is not None and not isinstance(read_text, Tokenizer):
        about["tokenizer"] = read_text.identity
    if restart:
        remove_run(output)
    if (done := _done_before(output, about)) is not None:
        return Embedding(output, done, 0, read_skipped(output))
    store = PartStore(output, about, batch_size * batches_per_part, len(inputs))
    missing = store.missing()
    to_do = sum(map(len, missing))
    encoder, load = _modality(model, inputs, pictures, read_text)
    captions: dict[int, str | None] = {}

    def read(row: int) -> Any:
        content = inputs.read(row)
        captions[row] = inputs.caption(row, content)
        return load(content)

    with RowProgress(f"{kind}s", len(inputs), console, done=len(inputs) - to_do) as progress:
        for rows in missing:
            encoded = encode_rows(
                encoder,
                read,
                rows,
                batch_size=batch_size,
                workers=workers,
                fixed_batches=True,
                on_rows=progress,
            )
            features = F.normalize(encoded.features, dim=-1) if normalize else encoded.features
            values = features.numpy().astype(dtype)
            if not np.isfinite(values).all():
                raise ValueError(
                    f"dtype: got features that are too large for {dtype}, expected float32, or to normalise"
                )
            names = [inputs.name(row) for row in encoded.rows]
            unread = [(row, inputs.name(row), reason) for row, reason in encoded.skipped.items()]
            said = [captions[row] for row in encoded.rows]
            captions.clear()
            store.write(rows, Part(values, np.array(encoded.rows, np.int64), names, said, unread))
    count, skipped = store.join()
    return Embedding(output, count, to_do, skipped)


def _about(
    model: CLIP, inputs: Inputs, dtype: str, normalize: bool, batch_size: int, model_source: dict[str, str] | None
) -> dict[str, Any]:
    return {
        "kind": inputs.kind,
        "source": inputs.fingerprint(),
        "weights": weights_digest(model.state_dict()),
        "config": model.config.to_dict(),
        "model": model_source,
        "dtype": dtype,
        "normalize": normalize,
        "batch_size": batch_size,
    }


def _done_before(output: Path, about: dict[str, Any]) -> int | None:
    """Return how many rows an output of the same run holds; None if there is no output."""
    if not output.exists():
        return None
    found = read_about(output)
    # JSON has lists where configurations have tuples; where the model lies does not change what it computes
    wanted = dict.fromkeys([*DataOptions().of_pictures(), "tokenizer"]) | about
    same = {key: found.get(key) == _as_json(value) for key, value in wanted.items() if key != "model"}
    if not all(same.values()) or (output.suffix == ".npy" and not names_path(output).is_file()):
        changed = ", ".join(key for key, equal in same.items() if not equal)
        raise ValueError(
            f"output: got {output}, which is there and of another run ({changed} differ), expected a new name, or "
            f"--restart to replace it"
        )
    return int(found["count"])


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _unusual(options: DataOptions) -> dict[str, bool]:
    """Return what features depend on where pictures are read otherwise than usual."""
    return {name: value for name, value in options.of_pictures().items() if value}


def _modality(model: CLIP, inputs: Inputs, options: DataOptions, tokenizer: AnyTokenizer | None) -> tuple[Encoder, Any]:
    if tokenizer is not None:
        return text_encoder(model, tokenizer), str
    return picture_encoder(model), picture_loader(model, options)
