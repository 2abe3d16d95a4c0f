"""Training with the sigmoid loss as open_clip's script does it, on one rank and on four. The ranks load this file."""

from __future__ import annotations

import torchvision_on_cpu

# ranks have no conftest
torchvision_on_cpu.enable()

import open_clip  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from open_clip_train.scheduler import cosine_lr  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import clipfast  # noqa: E402
from clipfast.models.config import CLIPConfig  # noqa: E402
from clipfast.train.config import TrainConfig  # noqa: E402
from clipfast.train.objective import config_for  # noqa: E402
from clipfast.train.optimizer import parameter_groups  # noqa: E402
from clipfast.train.trainer import Trainer  # noqa: E402
from clipfast.train.workplace import Workplace  # noqa: E402

STEPS, BATCH, RATE, DECAY, WARMUP = 20, 8, 1e-2, 0.2, 5
CLASSIC = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}


def theirs() -> nn.Module:
    """What ``--model ViT-B-32 --siglip`` makes, but smaller."""
    torch.manual_seed(0)
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in CLASSIC.items()}
    return open_clip.CLIP(**config, init_logit_scale=torch.tensor(10.0).log().item(), init_logit_bias=-10).double()


def ours() -> clipfast.CLIP:
    """The same weights, in a model that learns by the sigmoid loss."""
    config = config_for(CLIPConfig.from_dict(CLASSIC), "siglip")
    return clipfast.load_weights(clipfast.create_model(config, dtype=torch.float64), theirs().state_dict())


def batch(step: int, rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, 58, (BATCH, 8), generator=generator)
    tokens[:, -1] = 59
    images = torch.randn(BATCH, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images.chunk(ranks)[rank], tokens.chunk(ranks)[rank]


def groups_of_theirs(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names that decay and those that do not, by the rule in open_clip's ``main.py``."""
    spared = [n for n, p in model.named_parameters() if p.ndim < 2 or any(w in n for w in ("bn", "ln", "bias"))]
    spared += [n for n, _ in model.named_parameters() if "logit_scale" in n and n not in spared]
    return [n for n, _ in model.named_parameters() if n not in spared], spared


def losses_of_theirs(rank: int, ranks: int) -> list[float]:
    model = theirs()
    decaying, spared = ([model.get_parameter(n) for n in names] for names in groups_of_theirs(model))
    groups = [{"params": spared, "weight_decay": 0.0}, {"params": decaying, "weight_decay": DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
    schedule = cosine_lr(optimizer, RATE, WARMUP, STEPS)
    towers = DistributedDataParallel(model) if ranks > 1 else model
    loss_of = open_clip.loss.SigLipLoss(rank=rank, world_size=ranks)
    losses = []
    for step in range(STEPS):
        schedule(step)
        optimizer.zero_grad()
        loss = loss_of(*towers(*batch(step, rank, ranks)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    joined = torch.tensor(losses, dtype=torch.float64)
    if ranks > 1:
        dist.all_reduce(joined)
    return (joined / ranks).tolist()


def losses_of_ours(rank: int, ranks: int, size: int | None = None) -> list[float]:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD if ranks > 1 else None)
    config = TrainConfig(
        STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        weight_decay=DECAY,
        decay_positions=True,
        micro_batch_size=size,
    )
    trainer = Trainer(ours(), config, place, equal_batches=True)
    assert trainer.loss == "siglip"
    return [trainer.take_step(*batch(step, rank, ranks)).loss for step in range(STEPS)]


def losses_of_both(rank: int, ranks: int) -> tuple[list[float], list[float], list[float]]:
    torch.set_num_threads(1)
    return losses_of_theirs(rank, ranks), losses_of_ours(rank, ranks), losses_of_ours(rank, ranks, size=1)


def test_decay_spares_what_open_clips_script_spares():
    model, decaying = ours(), groups_of_theirs(theirs())[0]
    names = {id(p): n for n, p in model.named_parameters()}
    chosen = {g["weight_decay"]: {names[id(p)] for p in g["params"]} for g in parameter_groups(model, 0.2)}
    positions = {"positional_embedding", "visual.positional_embedding"}
    assert chosen[0.2] == set(decaying) - positions
    assert {"logit_scale", "logit_bias"} <= chosen[0.0]
    groups = parameter_groups(model, 0.2, decay_positions=True)
    assert {names[id(p)] for p in groups[0]["params"]} == set(decaying)


def test_twenty_steps_are_open_clips():
    expected = torch.tensor(losses_of_theirs(0, 1), dtype=torch.float64)
    assert expected[-1] < 0.7 * expected[0]
    for size in (None, 3):
        found = torch.tensor(losses_of_ours(0, 1, size), dtype=torch.float64)
        assert (found - expected).abs().max() <= 1e-8


@pytest.mark.slow
def test_twenty_steps_on_four_ranks_are_open_clips():
    expected = losses_of_theirs(0, 1)
    for theirs_, *both in run_on_ranks(losses_of_both, 4):
        for found in (theirs_, *both):
            assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 1e-8
