"""Whatever users do to an accelerated model, in whatever order: it says what the plain model says."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import pytest
import torch
import user_actions
from user_actions import Subject
from user_libraries import LIBRARIES

# those of the exhaustive test: how many for each library, and the first one's seed
SEQUENCES = int(os.environ.get("CLIPFAST_ACTION_SEQUENCES", "2000"))
FIRST = int(os.environ.get("CLIPFAST_ACTION_FIRST", "1000"))

pytestmark = pytest.mark.filterwarnings("ignore")


def sequences(make: Callable[[], Subject], seeds: range) -> None:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        served = [user_actions.run(make, seed) for seed in seeds]
    steps = sum(map(len, served))
    print(f"{len(seeds)} sequences, {steps} comparisons, {sum(map(sum, served))} of them served by clipfast")
    # a model that is never served follows in everything
    assert sum(map(sum, served)) > steps / 10


@pytest.mark.parametrize("library", LIBRARIES)
def test_random_actions(library: str) -> None:
    sequences(LIBRARIES[library], range(25))


@pytest.mark.exhaustive
@pytest.mark.parametrize("library", LIBRARIES)
def test_many_random_actions(library: str) -> None:
    sequences(LIBRARIES[library], range(FIRST, FIRST + SEQUENCES))
