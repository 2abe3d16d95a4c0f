from __future__ import annotations

import io
import re
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from clipfast.data.batches import Batch, Shares, training_batches
from clipfast.data.shards import write_shards
from clipfast.data.sources import Pair, open_pairs
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.transform import image_transform

COUNT = 60


def picture(seed: int, size: int = 12) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def shards(tmp_path):
    write_shards((Pair(str(i), picture(i), str(1000 + i)) for i in range(COUNT)), tmp_path / "s", shard_size=13)
    return tmp_path / "s"


def batches(path, rank=0, world=1, first=0, last=15, workers=0, batch_size=12, **options) -> list[Batch]:
    transform = image_transform(8, train=True, scale=(0.3, 1.0))
    tokenizer = Tokenizer(context_length=8)
    shares = Shares(batch_size, rank, world)
    return list(
        training_batches(
            open_pairs(path), transform, tokenizer, shares, seed=5, first_step=first, last_step=last, workers=workers
        )
    )


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.tokens, y.tokens) for x, y in zip(a, b, strict=True)
    )


def captions(some: list[Batch]) -> list[str]:
    tokenizer = Tokenizer(context_length=8)
    return ["".join(re.findall(r"\d", tokenizer.decode(row))) for batch in some for row in batch.tokens]


def test_every_epoch_sees_every_pair_once(shards):
    some = batches(shards)
    names = captions(some)
    for epoch in range(3):
        seen = names[epoch * COUNT : (epoch + 1) * COUNT]
        assert sorted(int(name) for name in seen) == list(range(1000, 1000 + COUNT))
    assert not any(batch.skipped for batch in some)
    assert some[0].images.shape == (12, 3, 8, 8)


def test_ranks_share_a_step_and_see_what_one_would(shards):
    whole = batches(shards)
    for world in (2, 3, 4):
        parts = [batches(shards, rank, world) for rank in range(world)]
        joined = [
            Batch(torch.cat([b.images for b in step]), torch.cat([b.tokens for b in step]))
            for step in zip(*parts, strict=True)
        ]
        assert same(joined, whole)


def test_it_goes_on_at_any_step(shards):
    whole = batches(shards)
    for first in (1, 4, 5, 7, 14, 15):
        assert same(batches(shards, first=first), whole[first:])


@pytest.mark.slow
def test_workers_change_nothing(shards):
    # one worker beside none is in tests/train/test_run.py
    assert same(batches(shards, first=6, workers=2), batches(shards)[6:])


def test_the_state_of_torch_is_left_alone(shards):
    before = torch.random.get_rng_state()
    batches(shards, last=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_pairs_are_skipped_and_named(tmp_path):
    good = picture(1)
    pairs = [Pair(str(i), picture(i), f"{1000 + i}") for i in range(40)]
    pairs[3] = Pair("cut", good[: len(good) // 2], "1003")
    pairs[8] = Pair("empty caption", good, "  ")
    huge = bytearray(good)
    huge[16:24] = (100_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(huge[12:29]).to_bytes(4, "big")
    pairs[9] = Pair("huge", bytes(huge), "1009")
    pairs[20] = Pair("long", good, "1020 " * 200_000)
    write_shards(pairs, tmp_path)
    some = batches(tmp_path, last=4, batch_size=10)
    reasons = dict(skipped for batch in some for skipped in batch.skipped)
    assert {key.rpartition("/")[2] for key in reasons} == {"000000003", "000000008", "000000009"}
    for name, reason in (("003", "truncated or corrupt"), ("008", "caption is empty"), ("009", "too large")):
        assert any(key.endswith(name) and reason in text for key, text in reasons.items()), (name, reasons)
    assert all(batch.images.shape[0] == 10 for batch in some)
    names = captions(some)
    assert len(names) == 40
    assert {"1003", "1009"}.isdisjoint(names)
    # the same pairs take their places, whoever reads
    parts = [batches(tmp_path, rank, 2, last=4, batch_size=10) for rank in range(2)]
    assert torch.equal(torch.cat([parts[0][0].images, parts[1][0].images]), some[0].images)


def test_nothing_that_can_be_read(tmp_path):
    write_shards([Pair(str(i), picture(i), "") for i in range(4)], tmp_path)
    with pytest.raises(ValueError, match="100 pairs in a row cannot be used.*caption is empty"):
        batches(tmp_path, batch_size=2)


def test_shares_that_do_not_fit(shards):
    with pytest.raises(ValueError, match="got 12 pairs on 5 ranks"):
        Shares(12, 0, 5)
    with pytest.raises(ValueError, match="batch_size: got 61, expected at most 60"):
        batches(shards, batch_size=61)
