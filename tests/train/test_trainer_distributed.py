"""Several ranks train as one process with the joined batch. The ranks load this file."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

import clipfast
from clipfast.train.checkpoint import Checkpoints
from clipfast.train.config import TrainConfig
from clipfast.train.trainer import Trainer
from clipfast.train.workplace import Workplace

STEPS, BATCH = 10, 12
TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 2},
}
HALF = ("ddp bf16", "ddp pure_bf16", "ddp fp16", "fsdp bf16", "fsdp pure_bf16")
CASES = list(itertools.product(("ddp", "fsdp"), (None, 2)))
_TEXT = {"lock_text": True, "lock_image": True}
RECIPES = [
    ({"lock_image": True, "label_smoothing": 0.1}, ("ddp", None)),
    ({"lock_image": True, "label_smoothing": 0.1}, ("fsdp", 2)),
    (_TEXT | {"lock_image_unlocked_groups": 2}, ("ddp", 2)),
    (_TEXT | {"lock_image_unlocked_groups": 2}, ("fsdp", None)),
    (_TEXT, ("ddp", 2)),
    ({"teacher": True}, ("ddp", 2)),
    ({"teacher": True}, ("fsdp", None)),
    ({"sigmoid": True}, ("ddp", 2)),
    ({"sigmoid": True}, ("fsdp", None)),
    # its bias cannot change a softmax
    ({"sigmoid": True, "loss": "clip"}, ("ddp", None)),
]


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 38, (BATCH, 6), generator=generator)
    # captions of different lengths
    tokens[torch.arange(BATCH), torch.randint(1, 6, (BATCH,), generator=generator)] = 39
    tokens[:, -1] = 39
    return torch.randn(BATCH, 3, 16, 16, generator=generator, dtype=torch.float64), tokens


def config(strategy: str, size: int | None, precision: str = "fp32", **others: object) -> TrainConfig:
    return TrainConfig(
        STEPS,
        learning_rate=1e-2,
        warmup_steps=2,
        max_grad_norm=0.5,
        ema_decay=0.5,
        strategy=strategy,
        micro_batch_size=size,
        precision=precision,
        **others,
    )


def trainer_of(place: Workplace, strategy: str, size: int | None, precision: str = "fp32", **others: object) -> Trainer:
    torch.manual_seed(0)
    dtype = torch.float64 if precision == "fp32" else torch.float32
    bias = {"init_logit_bias": -4.0} if others.pop("sigmoid", False) else {}
    model = clipfast.create_model(TINY | bias, dtype=dtype)
    teacher = clipfast.create_model(TINY | {"embed_dim": 12}, dtype=dtype) if others.pop("teacher", False) else None
    return Trainer(model, config(strategy, size, precision, **others), place, equal_batches=True, teacher=teacher)


def run_steps(trainer: Trainer, steps: range) -> list[list[float]]:
    place = trainer.workplace
    shares = ([t.chunk(place.world_size)[place.rank] for t in batch(step)] for step in steps)
    dtype = next(iter(trainer.weights.values())).dtype
    results = [trainer.take_step(images.to(dtype), tokens) for images, tokens in shares]
    return [[r.loss, r.logit_scale, r.grad_norm] for r in results]


def whole(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {
        n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().flatten().tolist() for n, t in tensors.items()
    }


def trained(rank: int, ranks: int) -> list:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD)
    results = []
    for strategy, size in CASES:
        trainer = trainer_of(place, strategy, size)
        numbers = run_steps(trainer, range(STEPS))
        results.append([numbers, whole(trainer.weights), whole(trainer.ema)])
    for locks, (strategy, size) in RECIPES:
        trainer = trainer_of(place, strategy, size, **locks)
        numbers = run_steps(trainer, range(2))
        results.append([numbers, whole(trainer.weights), whole(trainer.frozen)])
    return results


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_train_as_one_process_with_the_joined_batch(ranks):
    per_rank = run_on_ranks(trained, ranks)
    alone = trainer_of(Workplace(torch.device("cpu")), "ddp", None)
    numbers = torch.tensor(run_steps(alone, range(STEPS)), dtype=torch.float64)
    expected = [whole(alone.weights), whole(alone.ema)]
    # the gradients were clipped, and the temperature learned
    assert (numbers[:, 2] > 0.5).any()
    assert (numbers[0, 1] - numbers[-1, 1]).abs() > 0.05
    for index, case in enumerate(CASES):
        for rank in per_rank:
            found, *states = rank[index]
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), numbers, rtol=1e-10, atol=1e-10)
            for state, exact in zip(states, expected, strict=True):
                assert state.keys() == exact.keys()
                for name in exact:
                    a, b = (torch.tensor(x[name], dtype=torch.float64) for x in (state, exact))
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=f"{case} {name}")
    for index, (locks, case) in enumerate(RECIPES, len(CASES)):
        alone = trainer_of(Workplace(torch.device("cpu")), "ddp", None, **locks)
        before = whole(alone.frozen)
        numbers = torch.tensor(run_steps(alone, range(2)), dtype=torch.float64)
        for found, weights, frozen in (rank[index] for rank in per_rank):
            torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), numbers, rtol=1e-10, atol=1e-10)
            assert frozen == before, case
            for name, exact in whole(alone.weights).items():
                a, b = (torch.tensor(x, dtype=torch.float64) for x in (weights[name], exact))
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=f"{locks} {case} {name}")


def goes_on(rank: int, ranks: int, folder: str, strategy: str, first: int, last: int) -> list:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD)
    trainer = trainer_of(place, strategy, 2)
    checkpoints = Checkpoints(folder, place)
    facts = checkpoints.load_last(trainer.state())
    if facts:
        trainer.loaded(facts["numbers"])
    assert trainer.step == first
    run_steps(trainer, range(first, last))
    checkpoints.save(trainer.state(), {"step": trainer.step, "numbers": trainer.numbers()})
    return [whole(trainer.weights), whole(trainer.ema)]


@pytest.mark.slow
def test_it_goes_on_with_another_number_of_ranks(tmp_path):
    """Four ranks of FSDP2, then two, then two of DDP, then one process: as one process from the start."""
    run_on_ranks(goes_on, 4, str(tmp_path), "fsdp", 0, 3)
    run_on_ranks(goes_on, 2, str(tmp_path), "fsdp", 3, 5)
    run_on_ranks(goes_on, 2, str(tmp_path), "ddp", 5, 8)
    place = Workplace(torch.device("cpu"))
    trainer = trainer_of(place, "ddp", 2)
    trainer.loaded(Checkpoints(tmp_path, place).load_last(trainer.state())["numbers"])
    run_steps(trainer, range(8, STEPS))
    alone = trainer_of(place, "ddp", None)
    run_steps(alone, range(STEPS))
    for found, exact in ((trainer.weights, alone.weights), (trainer.ema, alone.ema)):
        for name in exact:
            torch.testing.assert_close(found[name], exact[name], rtol=1e-10, atol=1e-10, msg=name)


def half_precisions(rank: int, ranks: int) -> dict[str, list[float]]:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD)
    results = {}
    for case in HALF:
        strategy, precision = case.split()
        numbers = run_steps(trainer_of(place, strategy, 3, precision), range(STEPS))
        results[case] = [loss for loss, *_ in numbers]
    return results


@pytest.mark.slow
def test_half_precisions_on_ranks():
    first, second = run_on_ranks(half_precisions, 2)
    assert first == second
    exact = [loss for loss, *_ in run_steps(trainer_of(Workplace(torch.device("cpu")), "ddp", None), range(STEPS))]
    for case, losses in first.items():
        assert losses[0] == pytest.approx(exact[0], rel=0.02), case
        assert losses[-1] == pytest.approx(exact[-1], rel=0.25), case


def disagree(rank: int, ranks: int) -> list[str]:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD)
    messages = []

    def fail_on_one() -> None:
        if rank == 1:
            raise FileNotFoundError("no such shard")

    for call in (
        lambda: place.agree("settings", {"a": 1, "b": rank}),
        lambda: place.together("data", fail_on_one),
    ):
        try:
            call()
            messages.append("no error")
        except (ValueError, RuntimeError, OSError) as error:
            messages.append(str(error))
    place.agree("settings", {"a": 1})
    return [*messages, str(place.any(rank == 1)), str(place.gather(rank))]


def test_what_goes_wrong_on_one_rank_is_an_error_on_all():
    first, second = run_on_ranks(disagree, 2)
    assert first[0] == second[0] == "settings: got b = 1 and not 0 on rank 1, expected what rank 0 has"
    assert first[1] == "data failed on rank 1: FileNotFoundError: no such shard"
    assert second[1] == "no such shard"
    assert first[2:] == second[2:] == ["True", "[0, 1]"]
