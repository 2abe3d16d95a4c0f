"""Training batches: which pairs a step sees, read and decoded by worker processes.

What a step sees depends on the seed and the step's number alone, not on ranks, workers or what ran before. So a run
that goes on at step k, on as many ranks as it likes, sees what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipfast.data.captions import draw_caption
from clipfast.data.naflex import NaFlexTransform
from clipfast.data.order import ShuffledOrder
from clipfast.data.pairs import Pair, PairError, PairSource
from clipfast.data.patch_budget import Part, PatchBudget
from clipfast.data.transform import ImageError, ImageTransform, load_image
from clipfast.data.workers import WAIT, StoppedReading, Workers, start_worker, until_stopped
from clipfast.modules.naflex import NaFlexBatch, Patches
from clipfast.notices import for_workers

# a pair is replaced by another this many times before the data as a whole are called unreadable
_ATTEMPTS = 100
# captions are cut here before they are tokenized: a context of 77 tokens ends long before
MAX_CAPTION = 20_000

Transform = ImageTransform | NaFlexTransform


class Batch(NamedTuple):
    """A rank's share of a step.

    Attributes:
        images: float32 ``[b, 3, H, W]``, or packed patches where the transform gives those.
        tokens: int64 ``[b, L]``.
        skipped: The key of each pair that could not be used, and why. Others took their places.
    """

    images: Tensor | NaFlexBatch
    tokens: Tensor
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Shares:
    """How a step's batch is shared: rank r of W takes the r-th of W equal parts.

    Attributes:
        batch_size: Pairs a step, over all ranks; a multiple of ``world_size``.
        rank: This one, from 0.
        world_size: How many there are.
    """

    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size: got {self.batch_size} pairs on {self.world_size} ranks, expected a multiple of the "
                f"ranks, 2 or more"
            )

    @property
    def per_rank(self) -> int:
        """Pairs a step on one rank."""
        return self.batch_size // self.world_size

    def positions(self, step: int) -> range:
        """Return the positions of this rank's pairs in the run's order; ``step`` counts from 0."""
        first = step * self.batch_size + self.rank * self.per_rank
        return range(first, first + self.per_rank)

    def part(self, step: int) -> Part:
        """Return what this rank reads for a step."""
        return Part(self.positions(step))


def training_batches(
    source: PairSource,
    transform: Transform,
    tokenizer: Callable[[list[str]], Tensor],
    shares: Shares | PatchBudget,
    *,
    seed: int,
    first_step: int = 0,
    last_step: int,
    workers: int = 0,
    pin_memory: bool = False,
    pool: int = 200_000,
    stop: Callable[[], bool] | None = None,
) -> Generator[Batch, None, None]:
    """Yield this rank's batches of the steps from ``first_step`` up to, not including, ``last_step``.

    A pair that cannot be used (missing, corrupt or huge picture, empty caption) is replaced by one that is drawn from
    those shuffled with it, and named in the batch. Batches never become smaller. Of several captions of a picture an
    epoch takes one (:func:`clipfast.data.captions.draw_caption`). Closing the generator ends the workers, even
    those that hang.

    Args:
        source: The pairs.
        transform: From picture to tensor or patches; a random crop is drawn from a generator of its own for each pair.
        tokenizer: From captions to token ids ``[b, L]``.
        shares: Which part of every step is this rank's; a :class:`~clipfast.data.patch_budget.PatchBudget` says of how
            many patches a step's pictures are too.
        seed: Of the order, the crops, the captions and the replacements.
        first_step: Where to go on, counted from 0.
        last_step: Where to end.
        workers: Processes that read and decode; 0 does it in this one.
        pin_memory: Whether batches lie in page-locked memory, for copies to a GPU.
        pool: Pairs shuffled together; see :class:`clipfast.data.order.ShuffledOrder`. Fewer, where the source cannot
            hold so many in memory.
        stop: Asked several times a second while a batch is waited for; once it returns True, batches end.

    Raises:
        ValueError: Fewer pairs than a batch holds, or none that can be read.
    """
    if len(source) < shares.batch_size:
        raise ValueError(f"batch_size: got {shares.batch_size}, expected at most {len(source)}, the pairs there are")
    pool = min(pool, source.together or pool)
    reader = _Reader(source, ShuffledOrder(source.groups, seed, pool=pool), transform, tokenizer, seed)
    crew = Workers() if workers else None
    if crew is None:
        reader.stop = stop
    loader = DataLoader(
        reader,
        batch_sampler=_Positions(shares, first_step, last_step),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        multiprocessing_context=crew,
        worker_init_fn=partial(start_worker, begin=for_workers()) if workers else None,
        timeout=WAIT if workers else 0,
        prefetch_factor=4 if workers else None,
        # PyTorch's own generator, which dropout draws from, is not to notice
        generator=torch.Generator(),
    )
    return until_stopped(loader, crew, stop)


def read_pairs(
    source: PairSource,
    indices: range,
    count: int,
    transform: Transform,
    tokenizer: Callable[[list[str]], Tensor],
    *,
    stop: Callable[[], bool] | None = None,
) -> tuple[Tensor | NaFlexBatch, Tensor, Tensor] | None:
    """Read pairs in their order, for measuring: a batch of one size, whatever can be read of it.

    Of several captions of a picture it is the first.

    Args:
        source: The pairs.
        indices: Which; those from ``count`` on are none.
        count: How many pairs there are to read in all.
        transform: From picture to tensor or patches.
        tokenizer: From captions to token ids.
        stop: Asked before each pair.

    Returns:
        ``images [b, 3, H, W]`` or packed patches, ``tokens [b, L]`` and bool ``[b]``: whether a row is a pair, or blank
        because there is none or it cannot be read. None once ``stop()`` is true.
    """
    blank = transform.blank(), ""
    rows: list[tuple[Tensor | Patches, str]] = []
    good = []
    for index in indices:
        if stop is not None and stop():
            return None
        try:
            if index >= count:
                raise _Unusable(f"pair {index}", "there is none")
            rows.append(_usable_pair(_read(source, index), 0, transform))
            good.append(True)
        except _Unusable:
            rows.append(blank)
            good.append(False)
    images, captions = zip(*rows, strict=True)
    return _joined(images), tokenizer(list(captions)), torch.tensor(good)


def why_unusable(source: PairSource, index: int, transform: Transform) -> str | None:
    """Say why a pair cannot be used, or None if it can."""
    try:
        _usable_pair(_read(source, index), 0, transform)
    except _Unusable as error:
        return f"{error.key}: {error.reason}"
    return None


class _Positions:
    """What each step reads, in the form in which ``DataLoader`` asks for it."""

    def __init__(self, shares: Shares | PatchBudget, first_step: int, last_step: int) -> None:
        self.shares, self.first_step, self.last_step = shares, first_step, last_step

    def __iter__(self) -> Iterator[Part]:
        return map(self.shares.part, range(self.first_step, self.last_step))

    def __len__(self) -> int:
        return max(0, self.last_step - self.first_step)


class _Reader(Dataset[Batch | ValueError]):
    """Reads and decodes whole batches by their positions in the run's order.

    Attributes:
        stop: Asked before each pair, where a process reads for itself.
    """

    stop: Callable[[], bool] | None = None

    def __init__(
        self,
        source: PairSource,
        order: ShuffledOrder,
        transform: Transform,
        tokenizer: Callable[[list[str]], Tensor],
        seed: int,
    ) -> None:
        self.source, self.order, self.transform, self.tokenizer, self.seed = source, order, transform, tokenizer, seed

    def __getitems__(self, part: Part) -> Batch | ValueError:
        skipped: list[tuple[str, str]] = []
        transform = (
            self.transform if part.max_patches is None else replace(self.transform, max_patches=part.max_patches)
        )
        try:
            pairs = [self._usable(position, transform, skipped) for position in part.positions]
            images, captions = zip(*pairs, strict=True)
        except ValueError as error:
            # it is raised where it is read: PyTorch would put the worker's traceback into its words
            return error
        return Batch(_joined(images), self.tokenizer(list(captions)), tuple(skipped))

    def _usable(
        self, position: int, transform: Transform, skipped: list[tuple[str, str]]
    ) -> tuple[Tensor | Patches, str]:
        """Return the picture and caption at a position, or those that take its place."""
        if self.stop is not None and self.stop():
            raise StoppedReading
        for attempt in range(_ATTEMPTS):
            index = self.order.beside(position, attempt) if attempt else self.order[position]
            try:
                return self._pair(index, position, transform, skipped)
            except _Unusable as error:
                skipped.append((error.key, error.reason))
        raise ValueError(
            f"data: {_ATTEMPTS} pairs in a row cannot be used, the last is {skipped[-1][0]}: {skipped[-1][1]}"
        )

    def _pair(
        self, index: int, position: int, transform: Transform, skipped: list[tuple[str, str]]
    ) -> tuple[Tensor | Patches, str]:
        pair = _read(self.source, index)
        generator = torch.Generator().manual_seed(_mixed(self.seed, position))
        epoch = position // len(self.order)
        usable = _usable_pair(pair, draw_caption(len(pair.captions), self.seed, epoch, index), transform, generator)
        # entries of its list of captions that are none are a loss too
        skipped += [(f"{pair.key}, {which}", reason) for which, reason in pair.unusable]
        return usable


def _read(source: PairSource, index: int) -> Pair:
    try:
        return source.read(index)
    except PairError as error:
        raise _Unusable(f"pair {index}", str(error)) from error


def _usable_pair(
    pair: Pair, chosen: int, transform: Transform, generator: torch.Generator | None = None
) -> tuple[Tensor | Patches, str]:
    caption = pair.captions[chosen].strip()
    if not caption:
        raise _Unusable(pair.key, "its caption is empty")
    try:
        image = transform(load_image(pair.image), generator)
    except ImageError as error:
        raise _Unusable(pair.key, str(error)) from error
    return image, caption[:MAX_CAPTION]


def _joined(images: Sequence[Tensor | Patches]) -> Tensor | NaFlexBatch:
    return NaFlexBatch.of(images) if isinstance(images[0], Patches) else torch.stack(images)


class _Unusable(Exception):
    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason


def _mixed(seed: int, position: int) -> int:
    """Return a seed for one position, unlike those of its neighbours."""
    return int(np.random.SeedSequence([seed, position]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _as_it_is(batch: Batch | ValueError) -> Batch | ValueError:
    return batch
