"""How a model does on pairs that training does not see, with every rank encoding its share of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from clipfast.data.batches import Transform, read_pairs, why_unusable
from clipfast.data.sources import PairSource
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.evaluate.names import is_chance
from clipfast.evaluate.retrieval import retrieval_recall
from clipfast.modules.naflex import NaFlexBatch
from clipfast.train.objective import held_out_loss
from clipfast.train.trainer import Trainer


class Validation:
    """Held-out pairs, encoded anew at every look.

    Args:
        source: The pairs; the first ``pairs`` of them are looked at, and those that cannot be read are left out.
        pairs: How many.
        transform: From picture to tensor, without anything random.
        tokenizer: From captions to tokens.
        batch_size: Pairs encoded at once on a rank.
    """

    def __init__(
        self, source: PairSource, pairs: int, transform: Transform, tokenizer: AnyTokenizer, batch_size: int
    ) -> None:
        self.source = source
        self.count = min(pairs, len(source))
        self.transform, self.tokenizer, self.batch_size = transform, tokenizer, batch_size

    def check(self) -> None:
        """Look for pairs that can be read: two, without which there is nothing to compare.

        Raises:
            ValueError: There are none. All that would be looked at have been tried then.
        """
        found, reasons = 0, []
        for index in range(self.count):
            reason = why_unusable(self.source, index, self.transform)
            if reason is None and (found := found + 1) == 2:
                return
            if reason is not None:
                reasons.append(reason)
        more = f": {reasons[0]}" if reasons else ""
        raise ValueError(f"val_data: got {self.count} pairs of which {found} can be read, expected 2 or more{more}")

    def measure(self, trainer: Trainer, stop: Callable[[], bool] | None = None) -> dict[str, float] | None:
        """Return ``val_loss`` (the run's loss of all pairs as one batch) and ``val_<direction>_r{k}``.

        The same on every rank; None if ``stop()`` became true on one of them. The model is in ``eval()`` meanwhile.
        """
        model, place = trainer.model, trainer.workplace
        model.eval()
        try:
            with torch.no_grad():
                features = []
                for batch in self._shares(trainer, stop):
                    if place.any(batch is None):
                        return None
                    features.append(self._encoded(trainer.shared, batch, place.device))
        finally:
            model.train()
        # a rank's rows and whether each counts
        image, text, counts = (torch.cat(parts) for parts in zip(*features, strict=True))
        joined = place.gather((image.cpu(), text.cpu(), counts))
        image, text, counts = (torch.cat(parts) for parts in zip(*joined, strict=True))
        image, text = image[counts], text[counts]
        if len(image) < 2:
            if place.leads:
                words = f"got {len(image)} pairs that can be read at step {trainer.step}, expected 2 or more"
                warnings.warn(f"val_data: {words}: training goes on", stacklevel=2)
            return {"val_pairs": len(image)}
        loss = held_out_loss(model, trainer.loss, image, text)
        recall = {f"val_{k}": v for k, v in retrieval_recall(image, text).items() if not is_chance(k)}
        return {"val_loss": float(loss), "val_pairs": len(image)} | recall

    def _shares(
        self, trainer: Trainer, stop: Callable[[], bool] | None
    ) -> Iterator[tuple[Tensor | NaFlexBatch, Tensor, Tensor] | None]:
        """Yield this rank's batches: as many of one size on every rank, for FSDP2's ranks take every step together."""
        place = trainer.workplace
        rounds = -(-self.count // (self.batch_size * place.world_size))
        for turn in range(rounds):
            first = (turn * place.world_size + place.rank) * self.batch_size
            share = range(first, first + self.batch_size)
            yield read_pairs(self.source, share, self.count, self.transform, self.tokenizer, stop=stop)

    def _encoded(
        self, shared: nn.Module, batch: tuple[Tensor | NaFlexBatch, Tensor, Tensor], device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        images, tokens, counts = batch
        towers = getattr(shared, "module", shared)
        features = towers(images.to(device), tokens)
        return features.image, features.text, counts
