"""The host path with a CUDA build of PyTorch and no GPU: fake tensors on ``cuda:0`` through towers and losses.

What the pretend card (``test_host_path.py``) runs with values, under CUDA's own names and dispatch keys. The autograd
engine wants a real device there, so the backward pass is walked node by node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast.modules import packing
from clipfast.modules import text as text_module
from clipfast.ops import attention_packed, plan

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="PyTorch is not a CUDA build"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the tests marked gpu run on"),
    pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning"),
]

LENGTHS = [4, 16, 9, 4, 2]


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Say that there is an H100, whose tensors have no values."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.amp.autocast_mode.torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    plan.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    plan.reset()


class Watch(TorchDispatchMode):
    """Collects the operators that run, and those among them that would make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        from pretend_card import why_host_waits

        out = op(*args, **(kwargs or {}))
        self.operators.append(str(op))
        devices = {x.device.type for x in (*args[:2], out) if isinstance(x, Tensor)}
        copies = op in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and len(devices) > 1
        if copies or why_host_waits(op, *args, **(kwargs or {})):
            self.waits.append(str(op))
        return out


def walk_backwards(loss: Tensor) -> int:
    """Call every node of the backward pass, as autograd's engine does; return how many gradients arrive at leaves."""
    order: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        stack = [(node, iter(node.next_functions))]
        seen.add(node)
        while stack:
            top, following = stack[-1]
            for successor, _ in following:
                if successor is not None and successor not in seen:
                    seen.add(successor)
                    stack.append((successor, iter(successor.next_functions)))
                    break
            else:
                order.append(top)
                stack.pop()

    visit(loss.grad_fn)
    arrived: dict[Node, dict[int, Tensor]] = {loss.grad_fn: {0: torch.ones_like(loss)}}
    leaves = 0
    for node in reversed(order):
        inputs = arrived.pop(node, {})
        if type(node).__name__ == "AccumulateGrad":
            leaves += bool(inputs)
            continue
        if not inputs:
            continue
        gradients = _call(node, inputs)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for gradient, (successor, place) in zip(gradients, node.next_functions, strict=False):
            if gradient is not None and successor is not None:
                # the engine sums what was broadcast, and casts
                wanted = successor._input_metadata[place]
                gradient = gradient.sum_to_size(tuple(wanted.shape)).to(wanted.dtype)
                known = arrived.setdefault(successor, {})
                known[place] = gradient if place not in known else known[place] + gradient
    return leaves


def _call(node: Node, inputs: dict[int, Tensor]) -> Any:
    shapes = node._input_metadata
    with torch.no_grad():
        if callable(node):
            return node(*(inputs.get(i) for i in range(len(shapes))))
        # of a torch.autograd.Function, which gets zeros where no gradient arrives
        zeros = (torch.zeros(tuple(m.shape), dtype=m.dtype, device=m.device) for m in shapes)
        return node.apply(*(inputs.get(i, zero) for i, zero in enumerate(zeros)))


def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, device="cuda")


def tokens() -> Tensor:
    return torch.randint(1, 98, (5, 16), device="cuda")


class Loss(nn.Module):
    """A loss between features."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.text, self.scale, self.bias = (nn.Parameter(torch.ones(shape)) for shape in ((5, 96), (), ()))
        self.loss = loss

    def forward(self, pixels: Tensor) -> Tensor:
        return self.loss(pixels.flatten(1)[:, :96], self.text, self.scale.exp(), self.bias)


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "ViT": (lambda: clipfast.ViT(32, 8, 64, layers=2, heads=2, output_dim=32), images),
    "ModifiedResNet": (lambda: clipfast.ModifiedResNet((1, 1, 1, 1), 32, 8, 32, 8), images),
    "text": (lambda: clipfast.TextTransformer(16, 100, 64, layers=3, heads=2, output_dim=32), tokens),
    "ContrastiveLoss": (lambda: Loss(clipfast.ContrastiveLoss()), images),
    "SigLipLoss": (lambda: Loss(clipfast.SigLipLoss()), images),
}


@pytest.fixture(autouse=True)
def captions_are_packed(card: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack captions of known lengths: reading them off the card is the one wait that is allowed, and has no values."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        packed = packing.pack(torch.zeros(5, 16, dtype=torch.int64), torch.tensor(LENGTHS) - 1)
        known = attention_packed._known(packed.cu_seqlens)
        assert known.longest == max(LENGTHS)  # computed where there are values
        buckets = known.buckets(torch.device("cpu"))
    tensors = {name: getattr(buckets, name).to("cuda") for name in ("pad", "unpad", "lengths")}
    known._buckets[torch.device("cuda", 0), False] = replace(buckets, **tensors)
    there = {name: getattr(packed, name).to("cuda") for name in ("tokens", "positions", "ends", "order")}
    known.on_device = packed.cu_seqlens.to("cuda", torch.int32)
    monkeypatch.setattr(text_module, "pack", lambda *args: packing.Packing(cu_seqlens=packed.cu_seqlens, **there))


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_nothing_waits(subject: str, backend: str, autocast: bool) -> None:
    make, inputs = SUBJECTS[subject]
    with torch.device("cuda"):
        model = make()
    batch = inputs()
    with clipfast.backend(backend), Watch() as watch:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            out = model(batch)
        forward = len(watch.operators)
        leaves = walk_backwards(out.float().sum())
    assert out.device == torch.device("cuda", 0)
    assert leaves == len(list(model.parameters()))
    assert len(watch.operators) > forward > 10
    assert not watch.waits, watch.waits
    served = any("clipfast.attention" in operator for operator in watch.operators)
    assert served == (backend == "triton" and subject in ("ViT", "text"))


class _Reading(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.cpu().to(gradient.device)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_wait_is_noticed(subject: str) -> None:
    make, inputs = SUBJECTS[subject]
    with torch.device("cuda"):
        model = make()
    for read, waits in ((Tensor.clone, 0), (Tensor.cpu, 2), (_Reading.apply, 2)):
        with Watch() as watch:
            walk_backwards(read(model(inputs())).sum())
        assert len(watch.waits) == waits, (read, watch.waits)
