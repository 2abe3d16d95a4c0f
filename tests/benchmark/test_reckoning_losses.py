"""The plan by which the losses are reckoned is the one of csrc/cuda, and its figures follow the tiles."""

from __future__ import annotations

from typing import Any

import kernels_on_cpu
import pytest

from clipfast.benchmark.reckoning import losses
from clipfast.benchmark.reckoning.cards import CARDS
from clipfast.benchmark.reckoning.losses import Tile


@pytest.fixture(scope="module")
def kernels() -> Any:
    return kernels_on_cpu.build()


@pytest.mark.parametrize("multiprocessors", [108, 132, 148])
def test_the_plan_is_that_of_the_kernels(kernels: Any, multiprocessors: int) -> None:
    for batch in (1, 300, 4096, 8192, 20011, 32768, 65536, 131072):
        for width in (64, 512, 768):
            group, parts, chunk, chunk_parts, _ = kernels.plans("float16", batch, batch, width, multiprocessors)
            assert losses.statistics_rows(batch, batch) == group
            assert losses.gradient_rows(batch, batch, width) == chunk
            assert losses.shares(group // 128, batch, multiprocessors) == parts
            assert losses.shares(chunk // 128, batch, multiprocessors) == chunk_parts


def test_time_follows_the_tile_and_the_work() -> None:
    card = CARDS[90]
    tiles = dict.fromkeys(
        losses.KERNELS, Tile({"tensor": 512.0, "issue": 136.0}, {"issue": 2000.0, "special": 1.0}, (136, 2000))
    )
    parts = losses.loss_ms(tiles, card, 32768, 512)
    # by hand: (32768 / 128)² tiles of 16 · 512 + 2000 clocks, 132 at a time, 97% of the places busy
    alone = 256**2 * (16 * 512 + 2000) / 0.7 / 132 / card.clock * 1e3
    assert alone < parts["statistics"] < alone / 0.95
    assert parts["products"] == pytest.approx(2 * 32768**2 * 512 * (1 / 600e12 + 1 / 560e12) * 1e3)
    assert sum(v for k, v in parts.items() if k != "all") == pytest.approx(parts["all"])
    assert "statistics" not in losses.loss_ms(tiles, card, 32768, 512, sigmoid=True)
    # a slab that is bound otherwise
    slower = dict.fromkeys(losses.KERNELS, Tile({"tensor": 512.0, "issue": 700.0}, {"issue": 2000.0}, (700, 2000)))
    assert losses.loss_ms(slower, card, 32768, 512)["all"] > 1.15 * parts["all"]


def test_waves_are_whole() -> None:
    # 33 rows of tiles in chunks of 32: the last launch has one row for all places
    assert losses.waves(128 * 32, 128 * 32, 128 * 32, 16) == 32
    assert losses.waves(128 * 33, 128 * 32, 128 * 32, 16) > 32
