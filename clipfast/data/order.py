"""The order in which training sees its pairs: computed from a seed, so that any part of it can be had at any time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np


class ShuffledOrder:
    """An endless sequence of the numbers below N: every epoch holds each once, in an order of its own.

    Pairs that lie together are read together: whole groups (shards) are put in a random order and pooled until a pool
    holds ``pool`` pairs, and each pool is shuffled. What fits into one pool is shuffled as a whole.

    Args:
        groups: How many pairs lie together, in order.
        seed: Of the order.
        pool: Pairs shuffled together, at least; a pool is made of whole groups.

    Raises:
        ValueError: No pairs, or ``pool`` is not positive.
    """

    def __init__(self, groups: Sequence[int], seed: int, *, pool: int = 200_000) -> None:
        if pool < 1:
            raise ValueError(f"pool: got {pool}, expected at least 1")
        self.groups = np.asarray(groups, dtype=np.int64)
        if not self.groups.sum():
            raise ValueError("groups: got no pairs, expected at least one")
        self.seed = seed
        self.pool = pool
        # groups' first numbers
        self._starts = np.concatenate([[0], np.cumsum(self.groups)])
        self._pools_of = lru_cache(2)(self._pools)
        self._shuffled_of = lru_cache(4)(self._shuffled)

    def __len__(self) -> int:
        """Return N, the length of an epoch."""
        return int(self._starts[-1])

    def __getstate__(self) -> tuple[np.ndarray, int, int]:
        return self.groups, self.seed, self.pool

    def __setstate__(self, state: tuple[np.ndarray, int, int]) -> None:
        self.__init__(state[0], state[1], pool=state[2])

    def __getitem__(self, position: int) -> int:
        """Return the number at a position, counted from the beginning of the first epoch."""
        numbers, place = self._pool_at(position)
        return int(numbers[place])

    def beside(self, position: int, attempt: int) -> int:
        """Return a number to take in the place of the one at a position: another draw of those shuffled with it."""
        numbers, _ = self._pool_at(position)
        return int(numbers[np.random.default_rng([self.seed, position, attempt]).integers(len(numbers))])

    def _pool_at(self, position: int) -> tuple[np.ndarray, int]:
        """Return the numbers that are shuffled with the one at a position, and its place among them."""
        epoch, within = divmod(position, len(self))
        ends, _ = self._pools_of(epoch)
        pool = int(np.searchsorted(ends, within, side="right"))
        first = int(ends[pool - 1]) if pool else 0
        return self._shuffled_of(epoch, pool), within - first

    def _pools(self, epoch: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return where each pool of an epoch ends, and its groups."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.groups))
        sizes = np.cumsum(self.groups[order])
        # a group belongs to the pool in which its first pair falls
        pool = (sizes - self.groups[order]) // self.pool
        last = np.flatnonzero(np.diff(pool, append=pool[-1] + 1))
        return sizes[last], np.split(order, last[:-1] + 1)

    def _shuffled(self, epoch: int, pool: int) -> np.ndarray:
        groups = self._pools_of(epoch)[1][pool]
        numbers = np.concatenate([np.arange(self._starts[g], self._starts[g + 1]) for g in groups])
        return np.random.default_rng([self.seed, epoch, pool]).permutation(numbers)
