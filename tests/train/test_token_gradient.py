"""The token table's gradient in memory that stays: PyTorch's, bit for bit, in whatever a trainer does."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast.train.config import TrainConfig
from clipfast.train.token_gradient import TokenGradient
from clipfast.train.trainer import Trainer

IDS = torch.tensor([[1, 7, 7, 2], [7, 3, 1, 0]])

TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2},
}


def tiny_model() -> clipfast.CLIP:
    torch.manual_seed(0)
    return clipfast.create_model(TINY)


def pairs(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 38, (10, 6), generator=generator)
    tokens[:, -1] = 39
    return torch.randn(10, 3, 16, 16, generator=generator), tokens


def embedding(**options: object) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(11, 5, **options)


def gradient(layer: nn.Embedding, parts: int, kept: TokenGradient | None) -> Tensor:
    layer.zero_grad()
    with kept.kept() if kept else nullcontext():
        for part in IDS.split(len(IDS) // parts):
            torch.manual_seed(1)
            x = layer(part)
            (x * torch.randn(x.shape)).sum().backward()
    return layer.weight.grad


@pytest.mark.parametrize("parts", [1, 2])
def test_pytorchs_gradient(parts: int) -> None:
    plain, layer = embedding(), embedding()
    kept = TokenGradient(layer)
    expected = gradient(plain, parts, None)
    for _ in range(3):
        found = gradient(layer, parts, kept)
        assert found.layout == torch.strided
        assert torch.equal(found, expected)
        assert not layer.sparse
        found.mul_(0.5)  # as clipping does


def test_memory_that_somebody_wrote_to() -> None:
    plain, layer = embedding(), embedding()
    kept = TokenGradient(layer)
    gradient(layer, 1, kept).fill_(float("nan"))
    assert torch.equal(gradient(layer, 1, kept), gradient(plain, 1, None))


def test_the_memory_stays() -> None:
    layer = embedding()
    kept = TokenGradient(layer)
    address = gradient(layer, 1, kept).data_ptr()
    assert gradient(layer, 1, kept).data_ptr() == address
    layer.double()
    assert gradient(layer, 1, kept).dtype == torch.float64


def hooked(layer: nn.Embedding) -> None:
    layer.weight.register_hook(lambda gradient: gradient * 2)


def frozen(layer: nn.Embedding) -> None:
    layer.weight.requires_grad_(False)


@pytest.mark.parametrize(
    "change", [hooked, frozen, nn.Embedding.bfloat16, lambda layer: setattr(layer, "sparse", True)]
)
def test_what_it_leaves_alone(change: object) -> None:
    layer = embedding()
    change(layer)
    was = layer.sparse
    with TokenGradient(layer).kept():
        assert layer.sparse is was
        assert layer.weight.grad is None


def steps(trainer: Trainer, kept: bool, count: int = 3) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the table's gradients as the optimizer gets them, and the weights in the end."""
    seen: list[Tensor] = []
    table = trainer.model.token_embedding.weight
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append(table.grad.clone()))
    if not kept:
        trainer._token_gradient = TokenGradient(nn.Identity())
    for step in range(count):
        trainer.take_step(*pairs(seed=step))
    return seen, trainer.model.state_dict()


@pytest.mark.parametrize(
    "options",
    [{}, {"grad_checkpointing": True}, {"precision": "bf16"}, {"precision": "pure_bf16"}],
    ids=str,
)
def test_a_trainers_gradients(options: dict[str, object]) -> None:
    config = TrainConfig(3, warmup_steps=0, **options)
    found, weights = steps(Trainer(tiny_model(), config), kept=True)
    expected, same = steps(Trainer(tiny_model(), config), kept=False)
    assert [torch.equal(a, b) for a, b in zip(found, expected, strict=True)] == [True] * 3
    assert float(found[0].abs().sum()) > 0
    for name, value in same.items():
        assert torch.equal(weights[name], value), name


def test_a_trainers_gradients_by_parts() -> None:
    """A row's sum has another order."""
    config = TrainConfig(1, warmup_steps=0, micro_batch_size=3)
    (found,), _ = steps(Trainer(tiny_model().double(), config), kept=True, count=1)
    (expected,), _ = steps(Trainer(tiny_model().double(), config), kept=False, count=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_trainer_gives_no_new_memory_to_the_table() -> None:
    trainer = Trainer(tiny_model(), TrainConfig(4, warmup_steps=0, micro_batch_size=2))
    addresses = []
    table = trainer.model.token_embedding.weight
    trainer.optimizer.register_step_pre_hook(lambda *_: addresses.append(table.grad.data_ptr()))
    trainer.take_step(*pairs())
    with _New(table.shape) as new:
        trainer.take_step(*pairs())
    assert addresses[0] == addresses[1]
    assert not new.seen
    assert not trainer.model.token_embedding.sparse
    assert table.grad is None


class _New(TorchDispatchMode):
    """Collects what makes an embedding's dense gradient."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.seen = shape, []

    def __torch_dispatch__(self, op: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = op(*args, **(kwargs or {}))
        is_dense = isinstance(out, Tensor) and out.layout == torch.strided and out.shape == self.shape
        if is_dense and ("embedding" in str(op) or "zeros" in str(op)):
            self.seen.append(str(op))
        return out
