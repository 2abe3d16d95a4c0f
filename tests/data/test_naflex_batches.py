"""Training batches of NaFlex: the same pictures on any number of ranks, within a budget of patches."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

import clipfast
from clipfast.data.batches import Batch, Shares, read_pairs, training_batches
from clipfast.data.patch_budget import PatchBudget
from clipfast.data.shards import write_shards
from clipfast.data.sources import Pair, open_pairs
from clipfast.data.tokenizer import Tokenizer

COUNT = 40


def picture(seed: int) -> bytes:
    """Return a picture of an aspect of its own."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(4, 40, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "s"
    write_shards((Pair(str(i), picture(i), str(1000 + i)) for i in range(COUNT)), folder, shard_size=13)
    return folder


def batches(path, shares, first=0, last=6, workers=0) -> list[Batch]:
    transform, tokenizer = clipfast.naflex_transform(16, 4, train=True), Tokenizer(context_length=8)
    some = training_batches(
        open_pairs(path), transform, tokenizer, shares, seed=5, first_step=first, last_step=last, workers=workers
    )
    return list(some)


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images.patches, y.images.patches)
        and torch.equal(x.images.grids, y.images.grids)
        and torch.equal(x.tokens, y.tokens)
        for x, y in zip(a, b, strict=True)
    )


def joined(parts: list[list[Batch]]) -> list[Batch]:
    return [
        Batch(
            clipfast.NaFlexBatch(
                torch.cat([b.images.patches for b in step]), torch.cat([b.images.grids for b in step])
            ),
            torch.cat([b.tokens for b in step]),
        )
        for step in zip(*parts, strict=True)
    ]


@pytest.mark.parametrize(
    "shares",
    [lambda rank, world: Shares(12, rank, world), lambda rank, world: PatchBudget(96, (8, 16, 24), rank, world, 3)],
    ids=["pairs", "budget"],
)
def test_ranks_share_a_step_and_it_goes_on_anywhere(shards, shares):
    whole = batches(shards, shares(0, 1))
    for world in (2, 4):
        parts = [batches(shards, shares(rank, world)) for rank in range(world)]
        assert len({len(part) for part in parts}) == 1
        for step in zip(*parts, strict=True):
            assert len({len(batch.images) for batch in step}) == 1
        assert same(joined(parts), whole)
    assert same(batches(shards, shares(0, 1), first=4), whole[4:])
    assert len({tuple(grid) for batch in whole for grid in batch.images.grids.tolist()}) > 5
    assert all(len(batch.images) == len(batch.tokens) for batch in whole)


def test_workers_change_nothing(shards):
    budget = PatchBudget(96, (8, 16), seed=1)
    assert same(batches(shards, budget, last=3, workers=1), batches(shards, budget, last=3))


def test_a_step_keeps_to_its_budget_and_draws_how_many_patches_a_picture_has(shards):
    budget = PatchBudget(100, (8, 16, 24), world_size=2)
    assert budget.batch_size == 12
    assert budget.mean_batch_size == pytest.approx((12 + 6 + 4) / 3)
    assert {budget.part(step).max_patches for step in range(50)} == {8, 16, 24}
    for step, batch in enumerate(batches(shards, budget, last=8)):
        positions, most = budget.part(step)
        assert len(batch.images) == len(positions) == 100 // most // 2
        assert int(batch.images.lengths.max()) <= most
        assert batch.images.total <= 50
    # pairs come in the run's order, none twice and none left out, over the ends of what is drawn at once too
    ranks = [PatchBudget(100, (8, 16, 24), rank, 2) for rank in range(2)]
    seen = [position for step in range(2060) for rank in ranks for position in rank.part(step).positions]
    assert seen == list(range(len(seen)))
    later = PatchBudget(100, (8, 16, 24), 1, 2)
    assert later.part(2050) == ranks[1].part(2050)
    assert [budget.part(i).max_patches for i in range(9)] != [
        PatchBudget(100, (8, 16, 24), 0, 2, seed=1).part(i).max_patches for i in range(9)
    ]


def test_one_budget_a_picture_draws_nothing():
    budget = PatchBudget(1024, [256])
    assert [budget.part(step) for step in (0, 1, 3000)] == [
        (range(4), 256), (range(4, 8), 256), (range(12_000, 12_004), 256)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, ()), r"max_patches: got \(\), expected positive numbers"),
        ((100, (16, 0)), r"max_patches: got \(16, 0\)"),
        ((100, (16, 64)), "patches: got 100 a step on 1 ranks, expected at least 128: a picture of 64 patches"),
        ((127, (16, 32), 0, 4), "patches: got 127 a step on 4 ranks, expected at least 128"),
    ],
)
def test_budgets_that_have_no_room(arguments, message):
    with pytest.raises(ValueError, match=message):
        PatchBudget(*arguments)


def test_unreadable_pictures_are_blank_where_pairs_are_measured(tmp_path):
    pairs = [Pair("0", picture(0), "a"), Pair("1", picture(1)[:60], "b"), Pair("2", picture(2), "c")]
    write_shards(iter(pairs), tmp_path / "s", shard_size=3)
    transform, tokenizer = clipfast.naflex_transform(16, 4), Tokenizer(context_length=8)
    images, tokens, good = read_pairs(open_pairs(tmp_path / "s"), range(5), 3, transform, tokenizer)
    assert good.tolist() == [True, False, True, False, False]
    assert len(images) == len(tokens) == 5
    assert [math.prod(grid) for grid in images.grids.tolist()][1::2] == [1, 1]
    assert not images.split(1)[1].patches.any()


def test_more_pairs_than_there_are(shards):
    with pytest.raises(ValueError, match=f"got 50, expected at most {COUNT}"):
        batches(shards, PatchBudget(400, (8, 16)))
