"""Small towers in float64, and what they compute with and without exact shortcuts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from oracle import relative_error
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import clipfast
from clipfast.modules.block import MLP

VOCABULARY, CONTEXT = 200, 77
EOS = VOCABULARY - 1
BOUND = 1e-12


def text_tower(**changes: object) -> clipfast.TextTransformer:
    torch.manual_seed(0)
    sizes = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 32, "layers": 3, "heads": 2}
    model = clipfast.TextTransformer(**(sizes | {"output_dim": 24} | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no bias stays at zero, no norm at one
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def image_tower(**changes: object) -> clipfast.ViT:
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "heads": 2, "output_dim": 24}
    return clipfast.ViT(**(sizes | changes)).double()


def outputs_and_gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)  # patch dropout draws
    out = model(inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    (weights * out).sum().backward()
    return {"output": out.detach()} | {k: p.grad.clone() for k, p in model.named_parameters()}


def assert_same_as_dense(model: nn.Module, inputs: Tensor) -> None:
    short = outputs_and_gradients(model, inputs)
    with clipfast.exact_shortcuts(False):
        dense = outputs_and_gradients(model, inputs)
    for name, expected in dense.items():
        assert relative_error(short[name], expected) <= BOUND, name


class _RowsOf(TorchFunctionMode):
    """Collects how many rows are multiplied with each of some weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.weights, self.seen = weights, []

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        if function is F.linear and any(args[1] is w for w in self.weights):
            self.seen.append(args[0].shape[:-1].numel())
        return function(*args, **(kwargs or {}))


@contextmanager
def rows_seen(*models: nn.Module) -> Iterator[list[int]]:
    """Collect how many tokens each MLP computes; a patched method would be obeyed, and nothing left out."""
    with _RowsOf([m.c_proj.weight for model in models for m in model.modules() if isinstance(m, MLP)]) as mode:
        yield mode.seen
