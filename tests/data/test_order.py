from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfast.data.order import ShuffledOrder


@settings(max_examples=60, deadline=None)
@given(
    groups=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(sum),
    pool=st.integers(1, 60),
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 3),
)
def test_every_epoch_holds_every_number_once(groups, pool, seed, epoch):
    order = ShuffledOrder(groups, seed, pool=pool)
    total = sum(groups)
    assert len(order) == total
    assert sorted(order[epoch * total + i] for i in range(total)) == list(range(total))


def test_epochs_and_seeds_differ_and_a_copy_agrees():
    order = ShuffledOrder([100], seed=3)
    epochs = [[order[e * 100 + i] for i in range(100)] for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2] != list(range(100))
    assert [ShuffledOrder([100], seed=4)[i] for i in range(100)] != epochs[0]
    copy = pickle.loads(pickle.dumps(order))
    assert [copy[200 + i] for i in range(100)] == epochs[2]


def test_pools_mix_whole_groups_and_no_others():
    groups = [10] * 20
    order = ShuffledOrder(groups, seed=0, pool=40)
    shards = np.array([order[i] // 10 for i in range(200)]).reshape(5, 40)
    for pool in shards:
        values, counts = np.unique(pool, return_counts=True)
        assert len(values) == 4
        assert (counts == 10).all()
        # mixed, not one shard after the other
        assert len(np.flatnonzero(np.diff(pool))) > 15
    assert not np.array_equal(np.sort(shards[0]), np.sort(np.array([order[200 + i] // 10 for i in range(40)])))


def test_nothing_to_order():
    with pytest.raises(ValueError, match="got no pairs"):
        ShuffledOrder([0, 0], seed=0)
    with pytest.raises(ValueError, match="pool: got 0"):
        ShuffledOrder([1], seed=0, pool=0)
