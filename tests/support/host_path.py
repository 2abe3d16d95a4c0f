"""Towers and losses on a pretend card: what is run there, and what its host may wait for.

Importing this makes the card, which wants a process of its own (see :mod:`pretend_card`), and wants to come before
clipfast's operators: as a plugin of pytest's, ``PYTHONPATH=tests/support python -m pytest -p host_path``.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import interpreter
import pretend_card
import torch
import torch.nn.functional as F
from pretend_card import Record, is_on_card, watching
from torch import Tensor, nn

assert "clipfast.ops" not in sys.modules, "clipfast's operators are there already: run pytest with -p host_path"
interpreter.enable()
pretend_card.install()
CARD = torch.device(pretend_card.NAME, 0)

import clipfast  # noqa: E402

LENGTHS = [4, 16, 9, 4, 2]
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 100, "width": 64, "heads": 2, "layers": 3},
}


def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tokens() -> Tensor:
    ids = torch.randint(1, 98, (5, 16), generator=torch.Generator().manual_seed(1))
    ids[torch.arange(5), torch.tensor(LENGTHS) - 1] = 99
    return ids


def drawn(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class Trained(nn.Module):
    """A CLIP up to its loss."""

    def __init__(self, loss: nn.Module, **changes: object) -> None:
        super().__init__()
        config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | changes}
        self.clip, self.loss = clipfast.create_model(config), loss
        self.bias = nn.Parameter(torch.tensor(-1.0))

    def forward(self, pairs: tuple[Tensor, Tensor]) -> Tensor:
        image, text, scale = self.clip(*pairs)
        return self.loss(image, text, scale, self.bias)

    def set_grad_checkpointing(self) -> None:
        self.clip.set_grad_checkpointing()


class Features(nn.Module):
    """CLIP's loss between features alone."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.scale = nn.Parameter(torch.randn(5, 32)), nn.Parameter(torch.tensor(2.0))
        self.loss = clipfast.ContrastiveLoss()

    def forward(self, pixels: Tensor) -> Tensor:
        image, text = (F.normalize(x, dim=-1) for x in (pixels.flatten(1)[:, :32], self.text))
        return self.loss(image, text, self.scale.exp())

    def set_grad_checkpointing(self) -> None:
        """Have nothing to compute again."""


def vit(**changes: object) -> nn.Module:
    return clipfast.ViT(32, 8, 64, layers=2, heads=2, output_dim=32, **changes)


def text() -> nn.Module:
    return clipfast.TextTransformer(16, 100, 64, layers=3, heads=2, output_dim=32)


@dataclass(frozen=True)
class Subject:
    """What is made, what it gets, and whether it packs captions and draws patches, both on the host."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    packs: bool = False
    draws: bool = False


SUBJECTS = {
    "ViT": Subject(vit, images),
    "patch dropout": Subject(lambda: vit(patch_dropout=0.5), images, draws=True),
    "ModifiedResNet": Subject(lambda: clipfast.ModifiedResNet((1, 1, 1, 1), 32, 8, 32, 8), images),
    "text": Subject(text, tokens, packs=True),
    "loss": Subject(Features, images),
    "CLIP": Subject(lambda: Trained(clipfast.ContrastiveLoss()), lambda: (images(), tokens()), packs=True),
    "SigLIP": Subject(
        lambda: Trained(clipfast.SigLipLoss(), patch_dropout=0.5), lambda: (images(), tokens()), packs=True, draws=True
    ),
}


def made(subject: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return drawn(SUBJECTS[subject].make()).to(dtype)


def inputs_of(subject: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> Any:
    inputs = SUBJECTS[subject].inputs()
    several = inputs if isinstance(inputs, tuple) else (inputs,)
    several = tuple(x.to(device, dtype if x.is_floating_point() else None) for x in several)
    return several if isinstance(inputs, tuple) else several[0]


def features(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Run forward alone."""
    return {"output": model(inputs)}


def results(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    """Run forward and backward; what comes out stays where it is."""
    model.zero_grad()
    torch.manual_seed(3)  # patch dropout draws
    out = model(inputs)
    device = out.device
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view_as(out) if out.dim() else None
    out.backward(weights)
    return {"output": out.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def on_card(
    subject: str, model: nn.Module | None = None, compute: Any = results, on_host: bool = False
) -> tuple[Record, dict[str, Tensor]]:
    """Return what happened on the card in one forward and backward pass, and the results, in host memory.

    Captions start in host memory where ``on_host``.
    """
    model = copy.deepcopy(made(subject) if model is None else model).to(CARD)
    inputs = inputs_of(subject, CARD, next(model.parameters()).dtype)
    if on_host:
        several = inputs if isinstance(inputs, tuple) else (inputs,)
        several = tuple(x if x.is_floating_point() else x.cpu() for x in several)
        inputs = several if isinstance(inputs, tuple) else several[0]
    with watching() as record:
        found = compute(model, inputs)
    return record, {name: value.cpu() for name, value in found.items()}


def check_record(
    subject: str,
    record: Record,
    packs: bool | None = None,
    draws: bool | None = None,
    buckets: bool = True,
    on_host: bool = False,
) -> None:
    """Check that the host waits for the captions' lengths before the first layer, and for nothing else.

    Packed captions go to the card in one copy, what PyTorch's attention needs of their buckets in another, and patches
    that were drawn in one of their own. Captions in host memory have lengths that nothing has to wait for.
    """
    packs = SUBJECTS[subject].packs if packs is None else packs
    draws = SUBJECTS[subject].draws if draws is None else draws
    waits, sends = packs and not on_host, packs + (packs and buckets) + draws
    assert record.operators, "nothing ran on the card"
    assert len(record.waits) == waits, f"{len(record.waits)} waits, expected {int(waits)}: {record.waits}"
    assert len(record.sends) == sends, f"{len(record.sends)} copies, expected {sends}: {record.sends}"
    if waits:
        assert "copies to the host" in record.waits[0]
        assert record.marks["first layer"][1] == 1, f"a wait behind the first layer: {record.waits}"


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Check results one by one; a gradient that is zero but for rounding is held to the scale of the others."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-4 * largest)
        error = float((actual[name].cpu().double() - value.double()).abs().max()) / scale
        assert error <= bound, f"{name}: {error:.2e}"


def check(subject: str, model: nn.Module | None = None) -> None:
    """Check one forward and backward pass on the card: what its host waits for, and the CPU's numbers."""
    model = made(subject) if model is None else model
    record, actual = on_card(subject, model)
    check_record(subject, record)
    assert_close(actual, results(model, inputs_of(subject)), 1e-10)


def graph_waits(graph: torch.fx.GraphModule) -> list[str]:
    """Return the operators of a traced graph that would make a GPU's host wait."""
    found = []
    for node in graph.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        reason = pretend_card.why_host_waits(node.target, *args, **kwargs)
        values = [v for v in (*args, node.meta.get("val")) if isinstance(v, Tensor)]
        moves = node.target in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if reason is not None or (moves and len({v.device for v in values}) > 1):
            found.append(f"{node.target} {reason or 'copies between host and card'}")
    return found


@functools.cache
def launch_kernels() -> None:
    """Let the card launch Triton kernels, which the interpreter runs on its memory."""
    interpreter.prepare()
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def launched(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if any(is_on_card(x) for x in tensors):
            assert all(is_on_card(x) for x in tensors), "a kernel of the card got a tensor of the host"
            pretend_card.note(self.fn.__name__)
            args = tuple(pretend_card.host_view(x) if is_on_card(x) else x for x in args)
            kwargs = {k: pretend_card.host_view(x) if is_on_card(x) else x for k, x in kwargs.items()}
        launch(self, *args, **kwargs)

    GridExecutor.__call__ = launched
