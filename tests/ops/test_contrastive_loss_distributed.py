"""The contrastive losses on several ranks: one process with the joined batch, and errors in place of waiting.

The ranks load this file, so it imports nothing that they need not.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import clipfast
from clipfast import ops
from clipfast.ops import contrastive_narrow, contrastive_ranks

STEPS, BATCH = 5, 24
COMMS = ("gather", "ring", "sent")
LOSSES = {"contrastive": clipfast.ContrastiveLoss, "siglip": clipfast.SigLipLoss}


class Towers(nn.Module):
    def __init__(self, name: str = "siglip") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(7, 5, dtype=torch.float64), nn.Linear(6, 5, dtype=torch.float64)
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        # CLIP's loss has no gradient for it, only rounding, which Adam would make steps of
        self.logit_bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64), requires_grad=name == "siglip")

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        pair = (F.normalize(tower(x), dim=-1) for tower, x in ((self.image, images), (self.text, texts)))
        return *pair, self.logit_scale.exp(), self.logit_bias


def batches() -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(BATCH, n, generator=generator, dtype=torch.float64) for n in (7, 6)] for _ in range(STEPS)]


def train(model: nn.Module, loss: nn.Module, shares: list[list[Tensor]], send: bool = False) -> list[list[float]]:
    """Return the losses, then every parameter after training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for images, texts in shares:
        features = model(images, texts)
        if send:
            loss.comm = ops.send_texts(features[1])
        value = loss(*features)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return [losses, *(p.detach().flatten().tolist() for p in model.parameters())]


def trained_on_ranks(rank: int, ranks: int) -> dict[tuple[str, str, str], list]:
    results = {}
    for name, comm, backend in itertools.product(LOSSES, COMMS, ("auto", "torch", "reference")):
        shares = [[t.chunk(ranks)[rank] for t in batch] for batch in batches()]
        loss = LOSSES[name](rank=rank, world_size=ranks, comm="gather" if comm == "sent" else comm)
        with ops.backend(backend):
            results[name, comm, backend] = train(DistributedDataParallel(Towers(name)), loss, shares, comm == "sent")
    return results


@pytest.mark.slow
def test_four_ranks_train_as_one_process_with_the_joined_batch() -> None:
    per_rank = run_on_ranks(trained_on_ranks, 4)
    with ops.backend("reference"):
        alone = {name: train(Towers(name), loss(), batches()) for name, loss in LOSSES.items()}
    for name, comm, backend in per_rank[0]:
        expected = [torch.tensor(x, dtype=torch.float64) for x in alone[name]]
        results = [[torch.tensor(x, dtype=torch.float64) for x in r[name, comm, backend]] for r in per_rank]
        losses = [r[0] for r in results]
        # CLIP's loss is the joined batch's on every rank, SigLIP's in the mean over ranks
        for value in losses if name == "contrastive" else [torch.stack(losses).mean(0)]:
            torch.testing.assert_close(value, expected[0], rtol=1e-10, atol=1e-10)
        for rank in results:
            for actual, exact in zip(rank[1:], expected[1:], strict=True):
                torch.testing.assert_close(actual, exact, rtol=1e-10, atol=1e-10, msg=f"{name} {comm} {backend}")


UNEVEN = (3, 1, 5)


def uneven(rank: int, ranks: int) -> list:
    """Return losses, accuracies and gradients after DDP's mean, of a batch that is shared unevenly."""
    first = sum(UNEVEN[:rank])
    results = []
    for name, comm, backend, normalize in itertools.product(
        ("contrastive", "siglip"), COMMS, ("reference", "auto", "torch"), (False, True)
    ):
        images, texts = (t[first : first + UNEVEN[rank]] for t in batches()[0])
        towers = Towers()
        image, text, scale, bias = towers(images, texts)
        options = {"logit_bias": bias, "group": dist.group.WORLD, "normalize": normalize}
        options["comm"] = ops.send_texts(text) if comm == "sent" else comm
        with ops.backend(backend):
            if name == "contrastive":
                value, found = ops.contrastive_loss(2 * image, text, scale, return_accuracy=True, **options)
            else:
                value, found = ops.siglip_loss(2 * image, text, scale, **options), ()
            options["comm"] = ops.send_texts(text) if comm == "sent" else comm
            each = (ops.contrastive_loss if name == "contrastive" else ops.siglip_loss)(
                2 * image, text, scale, reduction="none", **options
            )
        value.backward()
        numbers = [value.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]
        for number in numbers:
            dist.all_reduce(number)
        results.append([[(n / ranks).tolist() for n in numbers], [float(x) for x in found], each.tolist()])
    return results


@pytest.mark.slow
def test_uneven_batches() -> None:
    per_rank = run_on_ranks(uneven, len(UNEVEN))
    cases = itertools.product(
        ("contrastive", "siglip"),
        COMMS,
        ("reference", "auto", "torch"),
        (False, True),
    )
    for index, (name, _, _, normalize) in enumerate(cases):
        images, texts = (t[: sum(UNEVEN)] for t in batches()[0])
        towers = Towers()
        image, text, scale, bias = towers(images, texts)
        loss = ops.contrastive_loss if name == "contrastive" else ops.siglip_loss
        with ops.backend("reference"):
            value = loss(2 * image, text, scale, logit_bias=bias, normalize=normalize)
            each = loss(2 * image, text, scale, logit_bias=bias, normalize=normalize, reduction="none").detach()
            _, found = ops.contrastive_loss(2 * image, text, scale, return_accuracy=True)
        value.backward()
        exact = [value.detach()] + [torch.zeros_like(p) if p.grad is None else p.grad for p in towers.parameters()]
        for numbers, accuracy, _ in (rank[index] for rank in per_rank):
            for mine, theirs in zip(numbers, exact, strict=True):
                torch.testing.assert_close(torch.tensor(mine, dtype=torch.float64), theirs, rtol=1e-10, atol=1e-12)
            assert accuracy == ([float(x) for x in found] if name == "contrastive" else [])
        joined = torch.tensor([x for rank in per_rank for x in rank[index][2]], dtype=torch.float64)
        torch.testing.assert_close(joined, each, rtol=1e-10, atol=1e-12)


def narrow(rank: int, ranks: int) -> list[list[list[float]]]:
    """Return losses and features' gradients of an uneven batch in float32 under autocast, as on a card, by ``comm``.

    The last are SigLIP's in float64, where every rank gives its loss another weight, by the reference and by tiles.
    """
    contrastive_narrow._DEVICES = ("cpu",)
    rows = slice(sum(UNEVEN[:rank]), sum(UNEVEN[: rank + 1]))
    results = []

    def gradients(name: str, comm: str, features: list[Tensor], weight: float = 1.0) -> list[list[float]]:
        image, text = (x[rows].clone().requires_grad_() for x in features)
        loss = ops.contrastive_loss if name == "contrastive" else ops.siglip_loss
        sent = ops.send_texts(text) if comm == "sent" else comm
        value = loss(image, text, 9.0, group=dist.group.WORLD, comm=sent)
        (weight * value).backward()
        return [[value.item()], *(x.grad.flatten().tolist() for x in (image, text))]

    for name, comm in itertools.product(LOSSES, COMMS):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(name, comm, features_of(torch.float32)))
    for backend, comm in (("reference", "gather"), *(("auto", comm) for comm in COMMS)):
        with ops.backend(backend):
            results.append(gradients("siglip", comm, features_of(torch.float64), rank + 1.0))
    return results


def features_of(dtype: torch.dtype) -> list[Tensor]:
    """Return image and text features of the uneven batch; not normalised, of lengths that differ."""
    images, texts = (t[: sum(UNEVEN)].to(dtype) for t in batches()[0])
    sizes = torch.logspace(-1, 1, len(images), dtype=dtype)[:, None]
    return [F.normalize(images[:, :6], dim=-1) * sizes, F.normalize(texts, dim=-1) / sizes.flip(0)]


@pytest.mark.slow
def test_features_in_16_bits_and_weights_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive_narrow, "_DEVICES", ("cpu",))
    per_rank = run_on_ranks(narrow, len(UNEVEN))
    for index, (name, comm) in enumerate(itertools.product(LOSSES, COMMS)):
        image, text = (x.requires_grad_() for x in features_of(torch.float32))
        with torch.autocast("cpu", torch.bfloat16):
            value = (ops.contrastive_loss if name == "contrastive" else ops.siglip_loss)(image, text, 9.0)
        value.backward()
        values, *gradients = ([torch.tensor(r[index][i]) for r in per_rank] for i in range(3))
        torch.testing.assert_close(
            torch.stack(values).mean(), value.detach(), rtol=1e-5, atol=1e-6, msg=f"{name} {comm}"
        )
        for parts, exact in zip(gradients, (image.grad, text.grad), strict=True):
            found = torch.cat(parts).view_as(exact) / len(UNEVEN)
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5, msg=f"{name} {comm}")
    for rank in per_rank:
        reference, *others = rank[-len(COMMS) - 1 :]
        for other in others:
            for actual, expected in zip(other, reference, strict=True):
                assert actual == pytest.approx(expected, rel=1e-9, abs=1e-11)


def unfit(rank: int, ranks: int) -> list[str]:
    """Return each rank's error where rank 1 holds what the others do not."""
    good = torch.ones(2, 3, dtype=torch.float64)
    messages = []
    for odd in (good[:0], good[:, :2], good.float(), good.long(), torch.ones(2, 3, 1)):
        x = odd if rank == 1 else good
        try:
            ops.contrastive_loss(x, x, 1.0, group=dist.group.WORLD)
            messages.append("no error")
        except (TypeError, ValueError) as error:
            messages.append(str(error))
    # a rank alone under autocast would send other bytes
    contrastive_narrow._DEVICES = ("cpu",)
    with torch.autocast("cpu", torch.bfloat16, enabled=rank == 1):
        try:
            ops.contrastive_loss(good.float(), good.float(), 1.0, group=dist.group.WORLD)
        except ValueError as error:
            messages.append(str(error))
    return messages


def on_their_way(rank: int, ranks: int) -> list[str]:
    """Return what runs between the sending of texts and their arrival, forward and backward, in order."""
    events = []
    text, image = nn.Linear(6, 5), nn.Linear(7, 5)
    images, texts = (t.chunk(ranks)[rank].float() for t in batches()[0])
    for collective in ("_all_gather", "_reduce_scatter"):
        original = getattr(contrastive_ranks, collective)

        def watched(*args: object, original: object = original, name: str = collective, **keywords: object) -> object:
            events.append(name)
            return original(*args, **keywords)

        setattr(contrastive_ranks, collective, watched)
    text.register_full_backward_hook(lambda *_: events.append("text tower backward"))
    image.register_forward_hook(lambda *_: events.append("image tower"))
    image.register_full_backward_hook(lambda *_: events.append("image tower backward"))
    text_features = F.normalize(text(texts), dim=-1)
    sent = ops.send_texts(text_features, equal_batches=True)
    image_features = F.normalize(image(images), dim=-1)
    value = ops.contrastive_loss(image_features, text_features, 10.0, group=dist.group.WORLD, comm=sent)
    events.append("loss")
    value.backward()
    try:
        ops.contrastive_loss(image_features, text_features, 10.0, group=dist.group.WORLD, comm=sent)
    except RuntimeError as error:
        events.append(str(error))
    return events


def test_texts_travel_while_the_image_tower_runs() -> None:
    for events in run_on_ranks(on_their_way, 2):
        # the weights of rows are gathered once more on the way back
        events = [e for i, e in enumerate(events) if i == 0 or e != "_all_gather"]
        assert events[:-1] == [
            "_all_gather",
            "image tower",
            "loss",
            "_reduce_scatter",
            "image tower backward",
            "text tower backward",
        ]
        assert "got an exchange that a loss has used" in events[-1]


@pytest.mark.slow
def test_what_is_wrong_on_one_rank_is_an_error_on_all() -> None:
    first, second, third = run_on_ranks(unfit, 3)
    assert "B of at least 1" in second[0]
    assert "rank 1 cannot take part" in first[0]
    assert first[0] == third[0]
    assert all("width 2" in messages[1] and "on rank 1, expected 3" in messages[1] for messages in (first, second))
    assert "torch.float32 on rank 1" in third[2]
    assert "got torch.int64" in second[3]
    assert all("torch.float16 on rank 1" in messages[-1] for messages in (first, second, third))
    assert "expected [B, D]" in second[4]
    assert all("rank 1 cannot take part" in messages[i] for messages in (first, third) for i in (3, 4))
