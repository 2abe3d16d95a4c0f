"""Features of many pictures or texts, a batch at a time, past those that cannot be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from clipfast.data.input_transform import transform_of
from clipfast.data.model_inputs import tokenizer_of
from clipfast.data.read_ahead import read_ahead
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.models.clip import CLIP
from clipfast.modules.naflex import NaFlexBatch, Patches

T = TypeVar("T")


@dataclass
class Encoded:
    """Features of those of some rows that could be read.

    Attributes:
        features: float32 ``[n, E]`` on the CPU, as the model gives them.
        rows: Their n numbers, ascending if those asked for were.
        skipped: Why the others could not be read, by number.
    """

    features: Tensor
    rows: list[int]
    skipped: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoder(Generic[T]):
    """How one modality becomes features.

    Attributes:
        collate: Makes a batch on the model's device of a list of items.
        encode: Makes features ``[B, E]`` of a batch.
        filler: An item that stands where a row could not be read.
    """

    collate: Callable[[list[T]], Tensor]
    encode: Callable[[Tensor], Tensor]
    filler: T


def picture_encoder(model: CLIP) -> Encoder[Tensor | Patches]:
    """Return what makes features of pictures that :func:`clipfast.data.model_inputs.picture_loader` prepared."""
    like = model.logit_scale

    def collate(items: list[Tensor | Patches]) -> Tensor | NaFlexBatch:
        batch = NaFlexBatch.of(items) if isinstance(items[0], Patches) else torch.stack(items)
        return batch.to(device=like.device, dtype=like.dtype)

    return Encoder(collate, model.encode_image, transform_of(model.config.vision_cfg).blank())


def text_encoder(model: CLIP, tokenizer: AnyTokenizer | str | os.PathLike[str] | None = None) -> Encoder[str]:
    """Return what makes features of texts; those longer than the model's context are cut, as CLIP does.

    Raises:
        ValueError: As :func:`clipfast.data.choose_tokenizer.tokenizer_for`.
    """
    read = tokenizer_of(model, tokenizer)
    device = model.logit_scale.device
    return Encoder(lambda items: read(items).to(device), model.encode_text, "")


@torch.no_grad()
def encode_rows(
    encoder: Encoder[T],
    load: Callable[[int], T | None],
    rows: Iterable[int],
    *,
    batch_size: int = 64,
    workers: int = 2,
    fixed_batches: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> Encoded:
    """Encode rows in order. While a batch is computed, at most the next two are read.

    Args:
        encoder: Of their modality.
        load: Reads a row by its number; None where there is nothing to encode.
        rows: The numbers.
        batch_size: Rows a batch.
        workers: Threads that read; 0 reads between batches.
        fixed_batches: Whether a row that cannot be read leaves its place in the batch empty. Then a row's batch
            depends on its number alone, and so do the bits of its features.
        on_rows: Called with the number of rows each time some are done, about once a batch.

    Raises:
        ValueError: ``batch_size`` is not positive, or features are not finite.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    encoded, kept, skipped = [], [], {}
    batch: list[T] = []
    places: list[tuple[int, int]] = []  # (place in the batch, row)
    read = 0  # rows that were read and not yet told of

    def tell() -> None:
        nonlocal read
        if on_rows is not None and read:
            on_rows(read)
        read = 0

    def flush() -> None:
        if places:
            features = encoder.encode(encoder.collate(batch)).float().cpu()[[place for place, _ in places]]
            if not features.isfinite().all():
                wrong = places[int((~features.isfinite()).any(dim=1).nonzero()[0])][1]
                raise ValueError(f"features: got NaN or infinity for row {wrong}, expected finite ones of the model")
            encoded.append(features)
            kept.extend(row for _, row in places)
        batch.clear()
        places.clear()

    for row, item in read_ahead(load, rows, workers=workers, ahead=2 * batch_size):
        if isinstance(item, Exception):
            skipped[row] = f"{type(item).__name__}: {item}"
            if fixed_batches:
                batch.append(encoder.filler)
        elif item is not None:
            places.append((len(batch), row))
            batch.append(item)
        read += 1
        if len(batch) == batch_size:
            flush()
        if not batch or read >= batch_size:
            tell()
    flush()
    tell()
    return Encoded(torch.cat(encoded) if encoded else torch.empty(0, 0), kept, skipped)
