"""Training with the sigmoid loss as open_clip's script does it, on one rank and on four. The ranks load this file."""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from unittest import mock

import torchvision_on_cpu

# ranks have no conftest
torchvision_on_cpu.enable()

import open_clip  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from open_clip import timm_model  # noqa: E402
from open_clip_train.scheduler import cosine_lr  # noqa: E402
from ranks import run_on_ranks  # noqa: E402
from siglip_rivals import clipfast_keys  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import clipfast  # noqa: E402
from clipfast.models.config import CLIPConfig, get_config  # noqa: E402
from clipfast.train.config import TrainConfig  # noqa: E402
from clipfast.train.objective import config_for  # noqa: E402
from clipfast.train.optimizer import parameter_groups  # noqa: E402
from clipfast.train.trainer import Trainer  # noqa: E402
from clipfast.train.workplace import Workplace  # noqa: E402

KINDS = ("classic", "siglip")
STEPS, BATCH, RATE, DECAY, WARMUP = 20, 8, 1e-2, 0.2, 5
CLASSIC = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2},
}


def theirs(kind: str) -> nn.Module:
    """What ``--siglip`` makes of ViT-B-32 or ViT-B-16-SigLIP2, but smaller."""
    torch.manual_seed(0)
    scalars = {"init_logit_scale": math.log(10), "init_logit_bias": -10}
    if kind == "classic":
        return open_clip.CLIP(**copy.deepcopy(CLASSIC), **scalars).double()
    config = copy.deepcopy(open_clip.get_model_config("ViT-B-16-SigLIP2")) | {"embed_dim": 32} | scalars
    config.pop("custom_text")
    config["text_cfg"] |= CLASSIC["text_cfg"]
    small = functools.partial(timm_model.timm.create_model, depth=2, embed_dim=32, num_heads=2, img_size=32)
    with mock.patch.object(timm_model.timm, "create_model", small):
        return open_clip.CustomTextCLIP(**config).double()


def ours(kind: str) -> clipfast.CLIP:
    """The same weights, in a model that learns by the sigmoid loss."""
    config = CLIPConfig.from_dict(CLASSIC)
    if kind == "siglip":
        config = get_config("ViT-B-16-SigLIP2")
        vision = replace(config.vision_cfg, image_size=32, width=32, layers=2, head_width=16)
        config = replace(
            config, embed_dim=32, vision_cfg=vision, text_cfg=replace(config.text_cfg, **CLASSIC["text_cfg"])
        )
    state = theirs(kind).state_dict()
    model = clipfast.create_model(config_for(config, "siglip"), dtype=torch.float64)
    return clipfast.load_weights(model, clipfast_keys(state) if kind == "siglip" else state)


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


def losses_of_theirs(kind: str, rank: int, ranks: int) -> list[float]:
    model = theirs(kind)
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


def losses_of_ours(kind: str, rank: int, ranks: int, size: int | None = None) -> list[float]:
    place = Workplace(torch.device("cpu"), rank, ranks, dist.group.WORLD if ranks > 1 else None)
    config = TrainConfig(
        STEPS,
        learning_rate=RATE,
        warmup_steps=WARMUP,
        weight_decay=DECAY,
        decay_positions=True,
        micro_batch_size=size,
    )
    trainer = Trainer(ours(kind), config, place, equal_batches=True)
    assert trainer.loss == "siglip"
    return [trainer.take_step(*batch(step, rank, ranks)).loss for step in range(STEPS)]


def losses_of_all(rank: int, ranks: int) -> list[list[float]]:
    """Return the losses of open_clip's loop and of ours, of whole batches and by parts."""
    of_ours = (losses_of_ours("siglip", rank, ranks, size) for size in (None, 1))
    return [losses_of_theirs("siglip", rank, ranks), *of_ours]


@pytest.mark.parametrize("kind", KINDS)
def test_decay_spares_what_open_clips_script_spares(kind):
    model, other = ours(kind), theirs(kind)
    decaying = groups_of_theirs(other)[0]
    if kind == "siglip":
        decaying = clipfast_keys(
            {n: p for n, p in other.named_parameters() if n in decaying or "attn_pool.q" in n or "attn_pool.kv" in n}
        )
    names = {id(p): n for n, p in model.named_parameters()}

    def chosen(**options: bool) -> set[str]:
        first, second = parameter_groups(model, 0.2, **options)
        assert {first["weight_decay"], second["weight_decay"]} == {0.2, 0.0}
        assert {"logit_scale", "logit_bias"} <= {names[id(p)] for p in second["params"]}
        return {names[id(p)] for p in first["params"]}

    # of the probe's attention, which timm splits, the biases are no matrices
    expected = set(decaying) - {"visual.attn_pool.attn.in_proj_bias"}
    assert chosen(decay_positions=True) == expected
    positions = {"positional_embedding", "visual.positional_embedding", "visual.attn_pool.probe"}
    assert chosen() == expected - positions


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_open_clips(kind):
    expected = torch.tensor(losses_of_theirs(kind, 0, 1), dtype=torch.float64)
    assert expected[-1] < 0.7 * expected[0]
    for size in (None, 3):
        found = torch.tensor(losses_of_ours(kind, 0, 1, size), dtype=torch.float64)
        assert (found - expected).abs().max() <= 1e-8


@pytest.mark.slow
def test_twenty_steps_on_four_ranks_are_open_clips():
    """Their loop on four ranks, ours on four ranks and theirs on one are the same."""
    expected = torch.tensor(losses_of_theirs("siglip", 0, 1), dtype=torch.float64)
    for found in run_on_ranks(losses_of_all, 4):
        assert (torch.tensor(found, dtype=torch.float64) - expected).abs().max() <= 1e-8
