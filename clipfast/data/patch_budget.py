"""How many pictures of how many patches a step of NaFlex takes: the same on all ranks, and in every run of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# steps that are drawn at once
_BLOCK = 1024


class Part(NamedTuple):
    """What one rank reads for one step.

    Attributes:
        positions: Of its pairs in the run's order.
        max_patches: The most patches of a picture, where the step says it and not the transform.
    """

    positions: range
    max_patches: int | None = None


class PatchBudget:
    """A budget of patches a step, spent on many small pictures or on few large ones.

    A step draws the most patches of its pictures, and takes as many pictures as the budget has room for: whatever their
    aspects, a step's patches are no more. All ranks take equally many, and the r-th of W takes the r-th of W parts.

    Args:
        patches: Of a step, over all ranks.
        max_patches: The most of a picture; of several values a step draws one, each as likely.
        rank: This one, from 0.
        world_size: How many there are.
        seed: Of what is drawn.

    Attributes:
        batch_size: The most pairs of a step, over all ranks.
        mean_batch_size: The pairs of a step in the mean of all draws.

    Raises:
        ValueError: A number is not positive, or the budget has no room for a picture on each rank, and two in all.

    Source: Tschannen et al., "SigLIP 2" (2025), which draws from 128, 256, 576, 784 and 1,024.
    """

    def __init__(
        self, patches: int, max_patches: Sequence[int], rank: int = 0, world_size: int = 1, seed: int = 0
    ) -> None:
        self.patches, self.max_patches = patches, tuple(max_patches)
        self.rank, self.world_size, self.seed = rank, world_size, seed
        if not self.max_patches or min(self.max_patches) < 1:
            raise ValueError(f"max_patches: got {self.max_patches}, expected positive numbers, at least one")
        # whole shares alone
        self._pairs = np.array([patches // most // world_size * world_size for most in self.max_patches])
        least = max(self.max_patches) * max(2, world_size)
        if self._pairs.min() < 2:
            raise ValueError(
                f"patches: got {patches} a step on {world_size} ranks, expected at least {least}: a picture of "
                f"{max(self.max_patches)} patches on each rank, and two in all"
            )
        self.batch_size = int(self._pairs.max())
        self.mean_batch_size = float(self._pairs.mean())
        # the pairs of all steps before each block that was asked for so far
        self._before = [0]

    def part(self, step: int) -> Part:
        """Return this rank's part of a step, counted from 0."""
        block, within = divmod(step, _BLOCK)
        while len(self._before) <= block:
            self._before.append(self._before[-1] + int(self._pairs[self._draws(len(self._before) - 1)].sum()))
        draws = self._draws(block)
        mine = int(self._pairs[draws[within]]) // self.world_size
        first = self._before[block] + int(self._pairs[draws[:within]].sum()) + self.rank * mine
        return Part(range(first, first + mine), self.max_patches[draws[within]])

    def _draws(self, block: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, 0, block]).integers(len(self.max_patches), size=_BLOCK)
