"""Ranks choose kernels by one plan, whose hash is in the log and in checkpoints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from train_runs import TINY, make_place, train

import clipfast
from clipfast.models.config import CLIPConfig
from clipfast.ops import plan, rules, trust, tuned
from clipfast.train.checkpoint import Checkpoints, read_facts
from clipfast.train.config import TrainConfig
from clipfast.train.plan import share_plan
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

CPU = torch.device("cpu")
KEY = rules.Key("layer_norm", ("float32",))


def tuned_for(backend: str) -> tuple[tuned.Tuned, str]:
    return tuned.Tuned(Path(f"{backend}.json"), {"layer_norm": {KEY.name: backend}}), ""


def chosen() -> str:
    return plan.decision("layer_norm", KEY, CPU).backend


def two_plans(rank: int, ranks: int) -> dict[str, object]:
    """What a rank chooses and knows; each has a tuned file of its own, and a check that failed on it alone."""
    own = ("native", "reference")[rank]
    tuned.find = lambda device: tuned_for(own)
    plan.reset()
    workplace = Workplace(CPU, rank, ranks, dist.group.WORLD)
    before = chosen(), plan.digest()
    first = share_plan(workplace)
    generation = plan.generation
    again = share_plan(workplace), plan.generation == generation
    trust._verdicts[CPU, f"kernel {rank}", 0] = f"kernel {rank}: wrong"
    trainer = Trainer(clipfast.create_model(CLIPConfig.from_dict(TINY)), TrainConfig(2), workplace)
    return {
        "before": before,
        "first": first,
        "again": again,
        "after": (chosen(), trainer.plan),
        "refused": [plan.refusal(f"kernel {i}") is not None for i in range(3)],
    }


@pytest.mark.slow
def test_ranks_share_rank_0s_plan_and_each_others_failures():
    one, two = run_on_ranks(two_plans, 2)
    assert (one["before"][0], two["before"][0]) == ("native", "reference")
    assert one["before"][1] != two["before"][1]
    # nobody had failed: the plan is rank 0's own, and to share it twice changes nothing
    assert one["first"] == two["first"] == one["before"][1]
    assert one["again"] == two["again"] == (one["first"], True)
    assert one["after"] == two["after"]
    assert one["after"][0] == "native"
    assert one["after"][1] != one["first"]
    assert one["refused"] == two["refused"] == [True, True, False]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    yield make_place(tmp_path)
    monkeypatch.undo()
    plan.reset()


def test_the_hash_is_kept_and_another_plan_is_told_once(place, tmp_path, monkeypatch):
    output = tmp_path / "run"
    train(place, output, steps=2, schedule="constant")
    first = plan.digest(CPU)
    facts = read_facts(Checkpoints(output / "checkpoints", Workplace(CPU)).list()[0])
    assert facts["plan"] == first
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(place, output, steps=2, schedule="constant")
    monkeypatch.setattr(tuned, "find", lambda device: tuned_for("reference"))
    plan.reset()
    assert plan.digest(CPU) != first
    with pytest.warns(UserWarning, match="the plan") as told:
        train(place, output, steps=3, schedule="constant")
    words = [str(warning.message) for warning in told if "plan" in str(warning.message)]
    assert len(words) == 1
    assert f"plan {plan.digest(CPU)} of kernels and not with {first}" in words[0]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["plan"] for line in lines] == [first, first, plan.digest(CPU)]
