"""Training on pictures of any aspect: packed patches, by a budget, on any number of ranks. The ranks load this file."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import run_on_ranks
from safetensors.torch import load_file
from train_runs import assert_same_end, train

import clipfast
from clipfast.data.batches import training_batches
from clipfast.data.patch_budget import PatchBudget
from clipfast.data.shards import write_shards
from clipfast.data.sources import Pair, open_pairs
from clipfast.data.tokenizer import Tokenizer
from clipfast.evaluate.retrieval import retrieval_recall
from clipfast.evaluate.run import Reading, evaluate
from clipfast.models.open_model import open_model
from clipfast.train.config import TrainConfig
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

TOWER = {"image_size": 16, "patch_size": 4, "width": 16, "layers": 1, "head_width": 8, "pool_type": "map"}
NAFLEX = {
    "embed_dim": 16,
    "vision_cfg": TOWER | {"class_token": False, "no_ln_pre": True, "proj_type": "none", "naflex": True},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
    "init_logit_bias": -10,
}
BUDGET = {"naflex_max_patches": "8,16", "naflex_tokens_per_batch": 128}
COUNT, STEPS = 40, 4


def picture(seed: int) -> bytes:
    """Return a picture of an aspect of its own."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(6, 40, 2)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("naflex")
    for name, count in (("shards", COUNT), ("held_out", 10)):
        write_shards((Pair(str(i), picture(i), f"number {i}") for i in range(count)), folder / name, shard_size=15)
    (folder / "tiny.json").write_text(json.dumps(NAFLEX))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def lines_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def test_a_run_by_a_budget_goes_on_and_is_measured(place, tmp_path):
    held_out = {"val_data": str(place / "held_out"), "val_every": 3}
    options = BUDGET | held_out | {"schedule": "constant", "workers": 1}
    result, said = train(place, tmp_path / "one", **options)
    # half the steps hold 128 / 8 pairs, half of them 128 / 16
    assert "pairs: 40, 12 in 128 patches a step, 6 steps" in said
    assert ", sigmoid loss" in said
    assert len(lines_of(tmp_path / "one")) == 6
    train(place, tmp_path / "parts", steps=3, **options)
    train(place, tmp_path / "parts", **options | {"workers": 0})
    assert_same_end(tmp_path / "parts", tmp_path / "one")
    # what was looked at on the way is what the evaluation finds, in other batches
    model = open_model(tmp_path / "one", device="cpu")
    found = evaluate(model, place / "held_out", reading=Reading(batch_size=3)).metrics
    for name in ("image_to_text_r5", "text_to_image_r5"):
        assert found[name] == result.metrics[f"val_{name}"]
    source = open_pairs(place / "held_out")
    read = [source.read(i) for i in range(len(source))]
    transform = clipfast.naflex_transform(16, 4)
    images = clipfast.NaFlexBatch.of([transform(Image.open(io.BytesIO(pair.image))) for pair in read])
    texts = model.encode_text(clipfast.tokenize([pair.caption for pair in read], 8))
    expected = retrieval_recall(model.encode_image(images), texts)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_epochs_count_the_pairs_of_a_mean_step(place, tmp_path):
    result, _ = train(place, tmp_path, steps=0, epochs=0.5, warmup_steps=1, **BUDGET)
    assert result.step == 2  # 20 pairs, 12 a step


def test_without_a_budget_pairs_are_counted(place, tmp_path):
    _, said = train(place, tmp_path, steps=2, naflex_max_patches="8")
    assert "pairs: 40, 8 a step" in said


def test_weights_of_one_size_learn_to_take_any_aspect(place, tmp_path):
    fixed = NAFLEX | {"vision_cfg": NAFLEX["vision_cfg"] | {"naflex": False}}
    (tmp_path / "fixed.json").write_text(json.dumps(fixed))
    train(place, tmp_path / "fixed", model=str(tmp_path / "fixed.json"), steps=2)
    weights = tmp_path / "fixed" / "model.safetensors"
    train(place, tmp_path / "any", weights=str(weights), steps=2, learning_rate=1e-9, **BUDGET)
    name = "visual.positional_embedding"
    found, before = (load_file(path)[name] for path in (tmp_path / "any" / "model.safetensors", weights))
    torch.testing.assert_close(found, before)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            None,
            {"naflex_max_patches": "16"},
            "naflex_max_patches: got '16' with a model whose pictures are of one size",
        ),
        (None, {"naflex_tokens_per_batch": 99}, "naflex_tokens_per_batch: got 99 with a model whose pictures"),
        (
            "any",
            {"naflex_tokens_per_batch": 31},
            "naflex_tokens_per_batch: got 31 a step on 1 ranks, expected at least",
        ),
        ("any", {"compile": "reduce-overhead"}, "compile: got 'reduce-overhead' with pictures of any aspect, expected"),
        ("any", BUDGET | {"naflex_tokens_per_batch": 999}, "batch_size: got 124, expected at most 40"),
    ],
)
def test_what_does_not_fit_is_refused(place, tmp_path, model, options, message):
    if model is None:
        options |= {"model": "ViT-B-32"}
    with pytest.raises(ValueError, match=message):
        train(place, tmp_path / "run", **options)


# --- ranks ------------------------------------------------------------------------------------------------------------

CASES = [("ddp", None), ("ddp", 2), ("fsdp", None)]


def losses(place: Workplace, data: str, strategy: str, size: int | None) -> list[list[float]]:
    torch.manual_seed(0)
    model = clipfast.create_model(NAFLEX, dtype=torch.float64)
    config = TrainConfig(STEPS, learning_rate=1e-2, warmup_steps=1, strategy=strategy, micro_batch_size=size)
    trainer = Trainer(model, config, place, equal_batches=True)
    budget = PatchBudget(128, (8, 16), place.rank, place.world_size)
    transform, tokenizer = clipfast.naflex_transform(16, 4, train=True), Tokenizer(context_length=8)
    batches = training_batches(open_pairs(data), transform, tokenizer, budget, seed=0, last_step=STEPS)
    taken = [trainer.take_step(batch.images.to(torch.float64), batch.tokens) for batch in batches]
    return [[step.loss, step.grad_norm, step.logit_bias] for step in taken]


def losses_of_rank(rank: int, ranks: int, data: str) -> list:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD)
    return [losses(place, data, *case) for case in CASES]


@pytest.mark.exhaustive  # shares of ranks and fixed pictures on ranks have tests of their own
def test_ranks_train_as_one_process(place):
    alone = losses(Workplace(torch.device("cpu")), str(place / "shards"), "ddp", None)
    expected = torch.tensor(alone, dtype=torch.float64).expand(len(CASES), -1, -1)
    for found in run_on_ranks(losses_of_rank, 2, str(place / "shards")):
        found = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(found[:, 0, 0], expected[:, 0, 0], rtol=1e-13, atol=0)
        # positions are resampled in float32, whose gradients add up in another order
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
