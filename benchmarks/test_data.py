"""How many images a second one core reads, decodes and augments, beside webdataset with open_clip's transform.

The pictures are synthetic photographs of 640 × 480 pixels in JPEG; the model takes 224 × 224.
"""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from harness import absent, by_scale, measure
from PIL import Image

import clipfast
from clipfast.benchmark.results import Row
from clipfast.data.batches import Shares, training_batches
from clipfast.data.shards import write_shards
from clipfast.data.sources import Pair, open_pairs

COUNT = by_scale(smoke=16, short=128, full=256)
BATCH = COUNT // 4


def photograph(seed: int) -> bytes:
    """Smooth colours with some noise, which take a JPEG decoder as long as photographs do."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
    noisy = np.asarray(small, dtype=np.int16) + rng.normal(0, 8, (480, 640, 1)).astype(np.int16)
    file = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards((Pair(str(i), photograph(i), f"a photo of number {i}") for i in range(COUNT)), folder)
    return folder


def theirs(folder):
    """open_clip's pipeline of the same pictures, in this process."""
    if reason := absent("open_clip", "webdataset", "torchvision"):
        return reason
    import open_clip
    import webdataset
    from open_clip.transform import image_transform

    transform, tokenizer = image_transform(224, is_train=True), open_clip.SimpleTokenizer()

    def run():
        shards = [str(p) for p in sorted(folder.glob("*.tar"))]
        data = (
            webdataset.WebDataset(shards, shardshuffle=False)
            .shuffle(1000)
            .decode("pilrgb")
            .rename(image="jpg;png", text="txt")
            .map_dict(image=transform, text=lambda text: tokenizer(text)[0])
            .to_tuple("image", "text")
            .batched(BATCH)
        )
        return list(data)

    return run


def test_images_on_one_core(shards, benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    source, tokenizer, transform = open_pairs(shards), clipfast.Tokenizer(), clipfast.image_transform(224, train=True)
    rounds = itertools.count()

    def ours():
        step = next(rounds) * (COUNT // BATCH)
        batches = training_batches(
            source, transform, tokenizer, Shares(BATCH), seed=0, first_step=step, last_step=step + COUNT // BATCH
        )
        return list(batches)

    assert sum(len(b.images) for b in ours()) == COUNT
    sides = {"clipfast": ours, "webdataset, open_clip": theirs(shards)}
    if not isinstance(sides["webdataset, open_clip"], str):
        assert sum(len(images) for images, _ in sides["webdataset, open_clip"]()) == COUNT
    row = Row(
        op="data",
        name=f"data path on one core, {COUNT} JPEG of 640 × 480 to 224 × 224",
        label="JPEG to tensors",
        direction="forward",
        dtype="float32",
        unit="images",
        items=COUNT,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measure(benchmark, row, sides)
    torch.set_num_threads(threads)
