"""A trainer's step on a pretend card waits once its work is queued; ``tests/test_host_path.py`` runs these tests."""

from __future__ import annotations

from collections.abc import Callable

import pretend_card
import pytest
import torch
from host_path import CARD, CONFIG, images, tokens
from pretend_card import Record, watching
from torch import Tensor

import clipfast
from clipfast.train import trainer
from clipfast.train.config import TrainConfig
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

pytestmark = pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")

STEP = "aten._fused_adamw_.default"


def made(precision: str = "fp32") -> Trainer:
    torch.manual_seed(0)
    config = TrainConfig(4, precision=precision, ema_decay=0.5)
    return Trainer(clipfast.create_model(CONFIG), config, Workplace(CARD))


def batch() -> tuple[Tensor, Tensor]:
    return images().float().pin_memory(), tokens().pin_memory()


def second_step(of: Trainer) -> Record:
    of.take_step(*batch())
    with watching() as record:
        of.take_step(*batch())
    return record


def check(record: Record) -> None:
    steps = [n for n, operator in enumerate(record.operators) if operator == STEP]
    assert steps, "no step was taken"
    # captions stay in host memory, where their lengths are known: what a step came to is all that is waited for
    (result,) = record.waits
    assert "trainer.py" in result, record.waits
    # the one copy to the host comes behind the optimizer
    assert record.marks["step"][1] == 0, f"a wait before the step: {record.waits}"


@pytest.fixture(autouse=True)
def _mark_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.AdamW.step

    def marked(self: torch.optim.AdamW) -> object:
        out = step(self)
        if (record := pretend_card._record) is not None:
            record.mark("step")
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", marked)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16", "fp16"])
def test_a_step(precision: str) -> None:
    check(second_step(made(precision)))


def read_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    clip = trainer.clip_gradients
    monkeypatch.setattr(trainer, "clip_gradients", lambda *a: clip(*a) if bool(a[0][0].isfinite().all()) else None)


def count_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    move = trainer.move_towards
    monkeypatch.setattr(trainer, "move_towards", lambda a, w, share: move(a, w, share * float(w[0].sum() * 0 + 1)))


def guard_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "step_if", lambda optimizer, sound, scaler: optimizer.step() if sound else None)


@pytest.mark.parametrize("plant", [read_the_loss, count_on_the_host, guard_by_hand])
def test_planted_waits(plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    record = second_step(made())
    with pytest.raises((AssertionError, ValueError), match=r"too many values|a wait before the step"):
        check(record)


@pytest.mark.parametrize("precision", ["fp32", "pure_bf16", "fp16"])
def test_a_bad_batch_changes_nothing_on_a_card(precision: str) -> None:
    of = made(precision)
    of.take_step(*batch())
    before = {name: value.cpu().clone() for name, value in of.state().items()}
    bad, captions = batch()
    bad[1] = torch.nan
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        of.take_step(bad.pin_memory(), captions)
    for name, value in of.state().items():
        assert torch.equal(value.cpu(), before[name]), name
    of.take_step(*batch())
