"""A model that is accelerated beside the original, and how their outputs and gradients are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from oracle import relative_error
from torch import Tensor, nn

import clipfast
from clipfast.models import twins


@dataclass(frozen=True)
class Case:
    """A model that is accelerated.

    Attributes:
        name: The test's name.
        make: Makes the model in float32.
        inputs: Makes the arguments of a call from a dtype.
        options: For ``accelerate``.
        towers: How many towers of the model clipfast serves in a call.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    towers: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def pair(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
        """Return the accelerated model and the original, with the same weights."""
        torch.manual_seed(0)
        original = self.make().to(dtype)
        return clipfast.accelerate(copy.deepcopy(original), **self.options), original

    def call(self, model: nn.Module, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return all the tensors that a call gives."""
        torch.manual_seed(1)
        return tensors_of(model(**self.inputs(dtype)))


def tensors_of(output: Any) -> list[Tensor]:
    """Return the tensors of a library's output, in order; None stays None in fields of its own."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [t for part in output if part is not None for t in tensors_of(part)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the calls of twins' blocks' stacks: whoever forgets to serve a call is found out."""
    calls: list[int] = []

    def count(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return nn.Module.__call__(self, *args, **kwargs)

    # not its forward: with another one, captions are not packed
    with mock.patch.object(twins.TwinTransformer, "__call__", count):
        yield calls


def loss_of(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return sum((torch.randn(t.shape, generator=generator).to(t) * t).sum() for t in outputs if t.requires_grad)


def assert_close(actual: list[Tensor], expected: list[Tensor], bound: float) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert relative_error(a, e) <= bound


def assert_same_gradients(model: nn.Module, original: nn.Module, bound: float = 1e-12) -> None:
    expected = {k: p.grad for k, p in original.named_parameters()}
    actual = {k: p.grad for k, p in model.named_parameters()}
    assert list(actual) == list(expected)
    for key, value in expected.items():
        assert (actual[key] is None) == (value is None), key
        if value is None:
            continue
        # a key bias moves all scores of a query alike: its gradient is nothing but rounding
        scale = expected[key.replace("k_proj.bias", "v_proj.bias")].abs().max()
        assert scale > 0, key
        assert (actual[key] - value).abs().max() <= bound * scale, key


def comparable(case: Case, outputs: list[Tensor]) -> list[Tensor]:
    """Leave out of the original's outputs the tokens that the accelerated model was told to leave out."""
    return outputs if case.options.get("token_outputs", True) else [t for t in outputs if t.dim() < 3]
