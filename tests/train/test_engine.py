from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import clipfast
from clipfast.train.engine import StepRecord, TrainConfig, train

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 1},
}


def tiny_model(seed: int = 0) -> clipfast.CLIP:
    torch.manual_seed(seed)
    return clipfast.create_model(TINY)


def pairs(batch_size: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random pictures, each with random words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 38, (batch_size, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(batch_size, 3, 16, 16, generator=generator), tokens


def forever(batch: tuple[torch.Tensor, torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        yield batch


def test_it_learns_its_pairs():
    model = tiny_model()
    result = train(model, forever(pairs()), TrainConfig(60, learning_rate=3e-3, warmup_steps=5))
    losses = [record.loss for record in result.history]
    assert losses[0] > 1
    assert losses[-1] < 0.05
    assert not result.interrupted
    images, tokens = pairs()
    assert torch.equal(model.eval().get_logits(images, tokens)[0].argmax(dim=1), torch.arange(8))


def test_steps_are_adamw_on_the_contrastive_loss():
    """Against the loop written out with PyTorch's own parts."""
    ours, theirs = tiny_model().double(), tiny_model().double()
    images, tokens = pairs()
    images = images.double()
    config = TrainConfig(4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.3, max_grad_norm=0.5)
    result = train(ours, forever((images, tokens)), config)

    spared = {name for name, p in theirs.named_parameters() if p.ndim < 2 or "positional" in name}
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in theirs.named_parameters() if name not in spared], "weight_decay": 0.3},
            {"params": [p for name, p in theirs.named_parameters() if name in spared], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    expected = []
    for rate in (0.5e-2, 1e-2, 1e-2, 0.5e-2):
        logits = theirs.get_logits(images, tokens)[0]
        labels = torch.arange(8)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    assert [record.learning_rate for record in result.history] == pytest.approx([0.5e-2, 1e-2, 1e-2, 0.5e-2])
    assert [record.loss for record in result.history] == pytest.approx(expected, rel=1e-12)
    for ours_p, theirs_p in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=1e-10, atol=1e-10)


def test_same_seed_same_weights():
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        train(model, forever(pairs()), TrainConfig(5))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_logit_scale_stops_at_its_limit(monkeypatch):
    def largest_scale() -> float:
        result = train(tiny_model(), forever(pairs()), TrainConfig(100, learning_rate=1e-2, warmup_steps=5))
        return max(record.logit_scale for record in result.history)

    assert largest_scale() > 16
    monkeypatch.setattr("clipfast.models.clip.MAX_LOGIT_SCALE", math.log(15))
    assert largest_scale() == pytest.approx(15)


def test_bf16_runs_the_towers_in_bfloat16_and_the_loss_in_float32():
    model = tiny_model()
    seen = []
    model.visual.transformer.resblocks[0].mlp.c_fc.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    result = train(model, forever(pairs()), TrainConfig(3, precision="bf16"))
    assert set(seen) == {torch.bfloat16}
    assert model.visual.proj.dtype == torch.float32
    exact = train(tiny_model(), forever(pairs()), TrainConfig(3))
    assert [r.loss for r in result.history] == pytest.approx([r.loss for r in exact.history], rel=0.05)


def test_log_has_a_line_for_each_step(tmp_path):
    seen: list[StepRecord] = []
    path = tmp_path / "new" / "log.jsonl"
    result = train(tiny_model(), forever(pairs()), TrainConfig(4), log_path=path, on_step=seen.append)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [StepRecord(**line) for line in lines] == result.history == seen
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["samples_per_second"] > 0 for line in lines)


def test_ctrl_c_ends_after_the_step_in_progress(tmp_path):
    model = tiny_model()

    def press_at_three(record: StepRecord) -> None:
        if record.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    result = train(model, forever(pairs()), TrainConfig(50), log_path=tmp_path / "log.jsonl", on_step=press_at_three)
    assert result.interrupted
    assert len(result.history) == 3
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights():
    model = tiny_model()
    images, tokens = pairs()
    broken = torch.where(torch.arange(8)[:, None, None, None] == 2, torch.nan, images)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield images, tokens
        yield broken, tokens

    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        train(model, batches(), TrainConfig(5))
    assert all(p.isfinite().all() for p in model.parameters())


def test_too_few_batches():
    with pytest.raises(ValueError, match="batches: ended after 1, expected 3"):
        train(tiny_model(), [pairs()], TrainConfig(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"steps": 1, "learning_rate": float("nan")}, "learning_rate: got nan"),
        ({"steps": 1, "precision": "fp8"}, "precision: got 'fp8'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)
