"""The loss modules on several ranks: values and gradients of one process with the joined batch.

The ranks load this file, so it imports nothing that they need not.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor, nn

import clipfast


def encoders() -> nn.ModuleDict:
    torch.manual_seed(0)
    towers = nn.ModuleDict({"image": nn.Linear(7, 5), "text": nn.Linear(6, 5)}).double()
    towers.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    towers.logit_bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
    return towers


def loss_of(towers: nn.ModuleDict, loss: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    pair = (F.normalize(towers[k](x), dim=-1) for k, x in (("image", images), ("text", texts)))
    return loss(*pair, towers.logit_scale.exp(), towers.logit_bias)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (7, 6))


def averaged_gradients(rank: int, ranks: int) -> list:
    """Return, for each loss and flags, the loss and the gradients after DDP's mean over ranks."""
    results = []
    for make in MAKERS:
        towers = encoders()
        images, texts = (t.chunk(ranks)[rank] for t in batch())
        value = loss_of(towers, make(rank, ranks), images, texts)
        value.backward()
        numbers = [value.detach()] + [p.grad if p.grad is not None else torch.zeros(()) for p in towers.parameters()]
        for number in numbers:
            dist.all_reduce(number)
            number /= ranks
        results.append([n.tolist() for n in numbers])
    return results


class Doubled(clipfast.ContrastiveLoss):
    """Logits that are not those of the features."""

    def get_logits(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, Tensor]:
        """Return twice the logits."""
        return tuple(2 * x for x in super().get_logits(*args, **kwargs))


MAKERS = [
    lambda r, w: clipfast.ContrastiveLoss(rank=r, world_size=w),
    lambda r, w: clipfast.ContrastiveLoss(local_loss=True, gather_with_grad=True, rank=r, world_size=w),
    lambda r, w: clipfast.SigLipLoss(rank=r, world_size=w),
    # what torch.distributed says, as under torchrun
    lambda r, w: clipfast.ContrastiveLoss(),
    lambda r, w: clipfast.ContrastiveLoss(local_loss=True, gather_with_grad=True),
    lambda r, w: clipfast.SigLipLoss(),
    lambda r, w: Doubled(),
    lambda r, w: Doubled(local_loss=True, gather_with_grad=True),
]


@pytest.mark.slow
def test_ranks_equal_one_process_with_the_joined_batch() -> None:
    per_rank = run_on_ranks(averaged_gradients, 2)
    for index, make in enumerate(MAKERS):
        towers = encoders()
        value = loss_of(towers, make(0, 1), *batch())
        value.backward()
        expected = [value.detach()] + [p.grad if p.grad is not None else torch.zeros(()) for p in towers.parameters()]
        for got in per_rank:
            for actual, exact in zip(got[index], expected, strict=True):
                actual = torch.tensor(actual, dtype=torch.float64)
                assert torch.allclose(actual, exact.double(), rtol=1e-12, atol=1e-14), index


def asked_for_less(rank: int, ranks: int) -> list:
    """Return the loss of this rank's batch alone, and what a pair of flags that gives wrong gradients raises."""
    images, texts = (F.normalize(t.chunk(ranks)[rank][:, :5], dim=-1) for t in batch())
    alone = [loss(images, texts, 14.0, None).item() for loss in (clipfast.ContrastiveLoss(rank=0, world_size=1),)]
    alone.append(clipfast.ContrastiveLoss(False, False, False, 0, 1)(images, texts, 14.0).item())
    try:
        clipfast.ContrastiveLoss(local_loss=True)(images, texts, 14.0)
    except ValueError as error:
        return [*alone, str(error)]
    return alone


@pytest.mark.slow
def test_one_process_alone_where_it_is_asked_for() -> None:
    for rank, (first, second, message) in enumerate(run_on_ranks(asked_for_less, 2)):
        images, texts = (F.normalize(t.chunk(2)[rank][:, :5], dim=-1) for t in batch())
        assert first == second == clipfast.ContrastiveLoss()(images, texts, 14.0).item()
        assert "wrong gradients" in message
