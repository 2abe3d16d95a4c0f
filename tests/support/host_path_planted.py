"""Waits that are planted anywhere on the host path are noticed; ``tests/test_host_path.py`` runs these tests."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from host_path import CARD, SUBJECTS, check, graph_waits, inputs_of, launch_kernels, made
from pretend_card import watching
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import clipfast
from clipfast.modules import block, patches, resnet
from clipfast.ops import (
    attention_packed,
    attention_triton,
    contrastive_kernels,
    dispatch,
    registry,
    transfer,
)

pytestmark = pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")

Patch = pytest.MonkeyPatch


def reading(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that reads a value of its first result."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        (out if isinstance(out, Tensor) else out[0]).sum().item()
        return out

    return wrapped


def reading_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose result's gradient is read in the backward pass."""

    def hook(gradient: Tensor) -> None:
        bool(gradient.isfinite().all())

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        (out if isinstance(out, Tensor) else out[0]).register_hook(hook)
        return out

    return wrapped


def replace(patch: Patch, op: str, wrap: Callable[..., Any], backend: str = "reference") -> None:
    """Wrap an implementation of an op."""
    registered = registry.entries[op]
    kept = tuple(
        dispatch.Implementation(i.backend, i.description, wrap(i.run)) if i.backend == backend else i
        for i in registered.implementations
    )
    patch.setitem(registry.entries, op, registered.with_implementations(*kept))


def attention(patch: Patch) -> None:
    patch.setattr(F, "scaled_dot_product_attention", reading(F.scaled_dot_product_attention))


def attention_backward(patch: Patch) -> None:
    patch.setattr(F, "scaled_dot_product_attention", reading_gradient(F.scaled_dot_product_attention))


def grouping_by_what_lies_on_the_card(patch: Patch) -> None:
    buckets_of = attention_packed.buckets_of
    patch.setattr(
        attention_packed,
        "buckets_of",
        lambda cu_seqlens, x, *rest, **named: buckets_of(
            attention_packed.on_device(cu_seqlens, CARD).clone(), x, *rest, **named
        ),
    )


def pageable_memory(patch: Patch) -> None:
    patch.setattr(transfer, "_send", lambda host, device: host.to(device, non_blocking=True))


def blocking_copy(patch: Patch) -> None:
    patch.setattr(transfer, "_send", lambda host, device: host.pin_memory().to(device))


def one_copy_each(patch: Patch) -> None:
    patch.setattr(transfer, "together", lambda parts, device: [transfer.to_device(part, device) for part in parts])


def layer_norm_forward(patch: Patch) -> None:
    replace(patch, "layer_norm", reading)


def layer_norm_backward(patch: Patch) -> None:
    replace(patch, "layer_norm", reading_gradient)


def add_layer_norm_backward(patch: Patch) -> None:
    replace(patch, "add_layer_norm", reading_gradient)


def gelu(patch: Patch) -> None:
    patch.setattr(F, "gelu", reading(F.gelu))


def read_of_the_last_block(patch: Patch) -> None:
    def by_mask(x: Tensor, read: int) -> Tensor:
        mask = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        mask[:, read] = True
        return x[mask]

    # another function would be noticed, and a block that is changed computes all its tokens
    patch.setattr(block.take_tokens, "__code__", by_mask.__code__)


def patches_copied(patch: Patch) -> None:
    patch.setattr(patches.transfer, "to_device", lambda host, device: host.to(device))


def batch_norm(patch: Patch) -> None:
    patch.setattr(resnet.Bottleneck, "_pool", reading(resnet.Bottleneck._pool))


def ids_checked_on_the_card(patch: Patch) -> None:
    check_tokens = clipfast.TextTransformer._check_tokens

    def checked(self: nn.Module, tokens: Tensor) -> None:
        check_tokens(self, tokens)
        if tokens.device == CARD and bool((tokens < 0).any()):
            raise ValueError

    patch.setattr("clipfast.modules.text.TextTower._check_tokens", checked)


def loss_forward(patch: Patch) -> None:
    patch.setattr(contrastive_kernels, "join_lse", reading(contrastive_kernels.join_lse))


def loss_backward(patch: Patch) -> None:
    add = contrastive_kernels._Sums.add

    def added(self: Any, *args: Any) -> None:
        add(self, *args)
        float(self.d_scale)

    patch.setattr(contrastive_kernels._Sums, "add", added)


def temperature(patch: Patch) -> None:
    forward = clipfast.ContrastiveLoss.forward

    def checked(self: nn.Module, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        assert scale <= 100
        return forward(self, image, text, scale, bias)

    patch.setattr(clipfast.ContrastiveLoss, "forward", checked)


def synchronised(patch: Patch) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        torch.pretend.synchronize()
        return MLP_FORWARD(self, x)

    patch.setattr(block.MLP, "forward", forward)


MLP_FORWARD = block.MLP.forward

PLANTED = [
    ("ViT", attention),
    ("text", attention),
    ("ViT", attention_backward),
    ("text", attention_backward),
    ("text", grouping_by_what_lies_on_the_card),
    ("text", pageable_memory),
    ("text", blocking_copy),
    ("text", one_copy_each),
    ("ViT", layer_norm_forward),
    ("ViT", layer_norm_backward),
    ("text", add_layer_norm_backward),
    ("ViT", gelu),
    ("ViT", read_of_the_last_block),
    ("patch dropout", patches_copied),
    ("patch dropout", pageable_memory),
    ("ModifiedResNet", batch_norm),
    ("text", ids_checked_on_the_card),
    ("CLIP", loss_forward),
    ("CLIP", loss_backward),
    ("SigLIP", loss_backward),
    ("CLIP", temperature),
    ("ViT", synchronised),
]


@pytest.mark.parametrize(("subject", "plant"), PLANTED, ids=[f"{s}-{p.__name__}" for s, p in PLANTED])
def test_planted(subject: str, plant: Callable[[Patch], None], monkeypatch: Patch) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"waits, expected|copies, expected|a wait behind"):
        check(subject)


def test_offsets_sent_by_every_layer(monkeypatch: Patch) -> None:
    pytest.importorskip("triton")
    launch_kernels()

    def attention_alone(*arguments: Any) -> str | None:
        first = next(x for x in arguments if isinstance(x, Tensor))
        return None if first.dim() == 4 else "not now"

    monkeypatch.setattr(attention_triton.kernel_ops, "refusal", attention_alone)
    on_device = attention_packed.on_device
    model = made("text", torch.float32)
    with clipfast.backend("triton"):
        sent = []
        for sends in (on_device, lambda offsets, device: on_device(offsets.clone(), device)):
            monkeypatch.setattr(attention_packed, "on_device", sends)
            with watching() as record:
                copy.deepcopy(model).to(CARD)(inputs_of("text", CARD))
            sent.append(len(record.sends))
            assert "streaming_forward" in record.operators
    # the last block's one query is PyTorch's, in buckets
    assert sent == [2, 4]


@pytest.fixture
def reads_behind_every_module() -> Iterator[list[str]]:
    read: list[str] = []

    def hook(module: nn.Module, args: object, out: object) -> None:
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, Tensor) and first.device == CARD:
            read.append(type(module).__name__)
            first.sum().item()

    handle = nn.modules.module.register_module_forward_hook(hook)
    yield read
    handle.remove()


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if name != "loss"])
def test_an_item_behind_any_module(subject: str, reads_behind_every_module: list[str]) -> None:
    model, inputs = made(subject).to(CARD), inputs_of(subject, CARD)
    with watching() as record:
        model(inputs)
    assert len(reads_behind_every_module) > 8
    # who looks at every module gets whole captions, and no length is read
    assert len(record.waits) == len(reads_behind_every_module)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_an_item_before_any_node_of_the_backward_pass(subject: str) -> None:
    model, read = made(subject).to(CARD), []
    out = model(inputs_of(subject, CARD))

    def hook(gradients: tuple[Tensor | None, ...]) -> None:
        first = next(g for g in gradients if g is not None)
        read.append(first.sum().item())

    seen, left = set(), [out.sum().grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left.extend(following for following, _ in node.next_functions)
            node.register_prehook(hook)
    with watching() as record:
        out.sum().backward() if out.dim() else out.backward()
    assert len(read) > (8 if subject == "loss" else 40)
    assert len(record.waits) == len(read)


OPERATIONS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).any()),
    "list": lambda x: x.tolist(),
    "to the host": lambda x: x.cpu(),
    "into the host": lambda x: torch.empty(3).copy_(x),
    "into the host later": lambda x: torch.empty(3).pin_memory().copy_(x, non_blocking=True),
    "from the host": lambda x: torch.ones(3).to(CARD),
    "from pageable memory": lambda x: torch.ones(3).to(CARD, non_blocking=True),
    "pinned, but waits": lambda x: torch.ones(3).pin_memory().to(CARD),
    "list to the card": lambda x: torch.tensor([1.0, 2.0], device=CARD),
    "written by the host": lambda x: x.copy_(torch.ones(3)),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.__setitem__(x > 0, torch.ones(1, device=CARD)),
    "index of the host": lambda x: x[torch.tensor([0, 2])],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "allclose": lambda x: torch.allclose(x, x),
    "unique": lambda x: x.unique(),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long, device=CARD)),
    "bincount": lambda x: x.long().abs().bincount(),
    "one_hot": lambda x: F.one_hot(x.long().abs()),
    "synchronize": lambda x: torch.pretend.synchronize(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_operations_that_wait(operation: Callable[[Tensor], object]) -> None:
    x = torch.tensor([1.0, -2.0, 3.0]).to(CARD)
    with watching() as record:
        operation(x)
    assert record.waits
    assert "host_path_planted.py" in record.waits[0]


def test_operations_that_do_not() -> None:
    x = torch.tensor([1.0, -2.0, 3.0]).to(CARD)
    with watching() as record:
        torch.ones(3).pin_memory().to(CARD, non_blocking=True)
        x.masked_fill(x > 0, 0.0)
        x[torch.arange(2, device=CARD)] = 0.0
        x.repeat_interleave(torch.ones(3, dtype=torch.long, device=CARD), output_size=3)
        torch.full((2,), 3.0, device=CARD) * torch.tensor(2.0)
        x.sort(), x.topk(2), x.cumsum(0), x.view(3, 1).expand(3, 2).contiguous()
    assert len(record.operators) > 8
    assert not record.waits


def test_a_copy_in_a_traced_graph() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.sin()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient.cpu().to(gradient.device)

    x = torch.ones(3).to(CARD).requires_grad_()
    torch._dynamo.reset()
    torch.compile(Round.apply, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x).sum().backward()
    assert [len(graph_waits(graph)) for graph in graphs] == [0, 2]
