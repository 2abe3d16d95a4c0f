"""The pictures of a run's steps: how many a rank reads, and what they become."""

from __future__ import annotations

from clipfast.data.batches import Shares, Transform
from clipfast.data.input_transform import transform_of
from clipfast.data.patch_budget import PatchBudget
from clipfast.models.config import CLIPConfig
from clipfast.train.config import RunConfig
from clipfast.train.limits import GRAPH_MODES, patch_counts
from clipfast.train.workplace import Workplace


class Pictures:
    """What each step takes of the data.

    Args:
        config: The run's.
        sizes: Its model's.
        place: This rank.

    Attributes:
        shares: Which pairs are this rank's.
        pairs_a_step: Over all ranks; of a budget of patches, the mean.
        pairs_measured: The most pairs that a rank encodes at once where held-out pairs are looked at.

    Raises:
        ValueError: Settings for pictures of any aspect and a model of one size, a budget without room for a picture on
            each rank, or as for :class:`clipfast.data.batches.Shares`.
    """

    def __init__(self, config: RunConfig, sizes: CLIPConfig, place: Workplace) -> None:
        self.config, self.vision = config, sizes.vision_cfg
        if not self.vision.naflex:
            for name in ("naflex_max_patches", "naflex_tokens_per_batch"):
                if (value := getattr(config, name)) is not None:
                    raise ValueError(
                        f"{name}: got {value!r} with a model whose pictures are of one size, expected one for any "
                        f"aspect, such as 'ViT-B-16-SigLIP2-NaFlex'"
                    )
        elif config.compile in GRAPH_MODES:
            raise ValueError(
                f"compile: got {config.compile!r} with pictures of any aspect, expected a mode without CUDA graphs "
                f"({GRAPH_MODES[config.compile]!r}): every batch has another number of patches"
            )
        self.counts = patch_counts(config.naflex_max_patches) if config.naflex_max_patches else ()
        budget = config.naflex_tokens_per_batch
        if budget is None:
            self.shares: Shares | PatchBudget = Shares(config.batch_size, place.rank, place.world_size)
            self.pairs_a_step: float = config.batch_size
            most = config.batch_size // place.world_size
        else:
            counts = self.counts or (self.transform(train=False).max_patches,)
            try:
                self.shares = PatchBudget(budget, counts, place.rank, place.world_size, config.seed)
            except ValueError as error:
                raise ValueError(f"naflex_tokens_per_batch: {str(error).removeprefix('patches: ')}") from error
            self.pairs_a_step = self.shares.mean_batch_size
            most = budget // max(counts) // place.world_size
        self.pairs_measured = min(config.micro_batch_size or 256, most)

    def transform(self, train: bool) -> Transform:
        """Return what makes a picture the model's input; to be measured, those of any aspect get the most patches."""
        most = max(self.counts) if self.counts else None
        return transform_of(self.vision, self.config.data_options(), train=train, max_patches=most)

    def __str__(self) -> str:
        if self.config.naflex_tokens_per_batch is None:
            return f"{self.config.batch_size} a step"
        return f"{self.pairs_a_step:.4g} in {self.config.naflex_tokens_per_batch} patches a step"
