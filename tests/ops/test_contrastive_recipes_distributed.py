"""Smoothed labels, groups, extra texts and teachers on four ranks: one process with the joined batch.

The ranks load this file, so it imports nothing that they need not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from contrastive_recipes import plain_distillation, plain_loss, recipe
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import clipfast
from clipfast import ops

# pairs and extra texts of each rank
PAIRS, EXTRA = (3, 1, 5, 3), (2, 0, 1, 4)
BATCH = sum(PAIRS)
COMMS = ("gather", "ring", "sent")
# recipe, comm, backend, normalised here or not
CASES = [
    *itertools.product(("smoothed", "grouped", "extra"), COMMS, ("torch",), (False,)),
    *itertools.product(("all three",), COMMS, ("torch", "auto"), (True,)),
    *itertools.product(("grouped and smoothed", "all three"), ("gather", "sent"), ("reference",), (True,)),
]


class Towers(nn.Module):
    """Two encoders; unnormalised features, as the loss must be right for those too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, 5, dtype=torch.float64), nn.Linear(6, 5, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, images: Tensor, texts: Tensor, extra: Tensor) -> tuple[Tensor, ...]:
        return self.image(images), self.text(texts), self.text(extra), self.logit_scale.exp()


def batch() -> list[Tensor]:
    """Return images, texts, extra texts, and a teacher's images and texts of another width."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, 7), (BATCH, 6), (sum(EXTRA), 6), (BATCH, 4), (BATCH, 4))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def share(x: Tensor, rank: int) -> Tensor:
    """Return a rank's rows of a joined batch."""
    return x.split(PAIRS if len(x) == BATCH else EXTRA)[rank]


def averaged(towers: nn.Module, value: Tensor, rank: int, ranks: int) -> list[list[float]]:
    """Return a loss and the encoders' gradients after DDP's mean."""
    value.backward()
    numbers = [value.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters())]
    for number in numbers:
        dist.all_reduce(number)
        number /= ranks
    return [n.flatten().tolist() for n in numbers]


def on_ranks(rank: int, ranks: int) -> dict:
    group, results = dist.group.WORLD, {}
    images, texts, extra, *teacher = (share(x, rank) for x in batch())
    for name, comm, backend, normalize in CASES:
        towers = Towers()
        image, text, more, scale = towers(images, texts, extra)
        options = recipe(name, BATCH, more) | {"group": group, "normalize": normalize}
        if "groups" in options:
            options["groups"] = share(options["groups"], rank)
        with ops.backend(backend):
            options["comm"] = ops.send_texts(text) if comm == "sent" else comm
            value = ops.contrastive_loss(image, text, scale, **options)
            options["comm"] = ops.send_texts(text) if comm == "sent" else comm
            each = ops.contrastive_loss(image, text, scale, reduction="none", **options).tolist()
            results[name, comm, backend, normalize] = averaged(towers, value, rank, ranks), each
    for comm, backend in (("gather", "torch"), ("ring", "auto"), ("gather", "reference")):
        towers = Towers()
        image, text, _, scale = towers(images, texts, extra)
        with ops.backend(backend):
            losses = clipfast.DistillClipLoss(comm=comm)(image, text, scale, *teacher, 3.0)
            results["teacher", comm, backend] = averaged(towers, losses[0] + 2 * losses[1], rank, ranks), []
    # as a training script has it: DDP, equal shares, the promise of them, a queue without gradients
    images, texts, extra, *_ = (x[:8].chunk(ranks)[rank] for x in (*batch()[:2], batch()[2].repeat(2, 1)))
    towers = DistributedDataParallel(Towers())
    loss = clipfast.ContrastiveLoss(equal_batches=True, label_smoothing=0.1)
    with towers.no_sync():
        # the first of two batches whose gradients add up
        image, text, more, scale = towers(images, texts, extra)
        loss(image, text, scale).backward()
    image, text, more, scale = towers(2 * images, texts, extra)
    loss(image, text, scale, groups=torch.arange(2), extra_text_features=more.detach()).backward()
    results["ddp"] = [p.grad.flatten().tolist() for p in towers.parameters()]
    return results


def unfit(rank: int, ranks: int) -> list[str]:
    """Return each rank's error where rank 1 was given what the others were not."""
    x, ids, messages = torch.ones(2, 3), torch.arange(2), []
    wrong = (
        ({"groups": ids}, {}),
        ({}, {"extra_text_features": x}),
        ({"groups": ids}, {"groups": ids[:1]}),
        ({"extra_text_features": x}, {"extra_text_features": x.double()}),
    )
    for usual, odd in wrong:
        try:
            ops.contrastive_loss(x, x, 1.0, group=dist.group.WORLD, **(odd if rank == 1 else usual))
            messages.append("no error")
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    try:
        teacher = torch.ones(2, 4 if rank == 1 else 5)
        ops.distillation_loss(x, x, 1.0, teacher, teacher, 1.0, group=dist.group.WORLD)
    except ValueError as error:
        messages.append(str(error))
    return messages


def everything(rank: int, ranks: int) -> tuple[dict, list[str]]:
    return on_ranks(rank, ranks), unfit(rank, ranks)


@pytest.mark.slow
def test_four_ranks_equal_one_process_with_the_joined_batch() -> None:
    answers = run_on_ranks(everything, len(PAIRS))
    images, texts, extra, *teacher = batch()

    def close(found: list[float], expected: Tensor, what: object) -> None:
        found = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(found, expected.flatten(), rtol=1e-10, atol=1e-12, msg=lambda m: f"{what}: {m}")

    for case in (c for c in answers[0][0] if c != "ddp"):
        towers = Towers()
        image, text, more, scale = towers(images, texts, extra)
        if case[0] == "teacher":
            losses = plain_distillation(image, text, scale, *teacher, 3.0)
            value, each = losses[0] + 2 * losses[1], torch.empty(0, dtype=torch.float64)
        else:
            options = recipe(case[0], BATCH, more) | {"normalize": case[3]}
            value = plain_loss(image, text, scale, **options)
            each = plain_loss(image, text, scale, reduction="none", **options).detach()
        value.backward()
        expected = [value.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters())]
        for found, _ in (results[case] for results, _ in answers):
            for number, exact in zip(found, expected, strict=True):
                close(number, exact, case)
        close([x for results, _ in answers for x in results[case][1]], each, case)

    towers = Towers()
    images, texts, extra = images[:8], texts[:8], extra.repeat(2, 1)[:8]
    image, text, more, scale = towers(images, texts, extra)
    plain_loss(image, text, scale, label_smoothing=0.1).backward()
    image, text, more, scale = towers(2 * images, texts, extra)
    options = {"label_smoothing": 0.1, "groups": torch.arange(2).repeat(4), "extra_text_features": more.detach()}
    plain_loss(image, text, scale, **options).backward()
    for results, _ in answers:
        for found, parameter in zip(results["ddp"], towers.parameters(), strict=True):
            close(found, parameter.grad, "ddp")

    for _, messages in answers:
        assert len(messages) == 5
        assert all("expected the same arguments on all" in m for m in messages[:2]), messages
        assert all("rank 1 cannot take part" in m or "groups" in m for m in messages[2:3]), messages
        assert all("rank 1 cannot take part" in m or "float64" in m for m in messages[3:4]), messages
        assert "got width 4" in messages[4] or "got width 5" in messages[4], messages
