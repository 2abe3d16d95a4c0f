"""What the op library's elementwise operators on the CPU (``csrc/cpu/rows.cpp``) share: what they serve, fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipfast.ops import keys, library
from clipfast.ops.dispatch import constant_when_compiled

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_fakes: dict[str, Callable[..., Any]] = {}
_library = torch.library.Library("clipfast", "FRAGMENT")


def fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate what returns empty results of an operator, in the right shapes and dtypes."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        _fakes[name] = function
        return function

    return keep


@constant_when_compiled
def _unavailable() -> str | None:
    reason = library.unavailable()
    if reason is not None:
        return reason
    if not torch.ops.clipfast.row_vectors():
        return "this CPU lacks the instructions (AVX2 and FMA)"
    # not before the library has defined the operators
    while _fakes:
        name, function = _fakes.popitem()
        torch.library.register_fake(f"clipfast::{name}", function, lib=_library)
    return None


def refusal(x: Tensor, *others: Tensor | None) -> str | None:
    """Return why the op library cannot serve rows, or None.

    Args:
        x: ``[..., C]``.
        *others: The other tensors of the call.
    """
    tensors = [x, *(t for t in others if t is not None)]
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"it runs on the CPU, the tensors are on {tensor.device}"
        if tensor.dtype not in DTYPES:
            return f"{str(tensor.dtype).removeprefix('torch.')} is not served (float32, float16 and bfloat16 are)"
        if type(tensor) not in keys.PLAIN or tensor.layout is not torch.strided:
            return f"{type(tensor).__name__} in the layout {tensor.layout} is not served (plain tensors are)"
    if keys.is_transformed():
        return "torch.func or forward-mode differentiation is at work"
    if x.shape[-1] == 0:
        return "width 0 is not served"
    return _unavailable()


def is_recorded(*tensors: Tensor | None) -> bool:
    """Return whether a call has to go through an autograd function; the operator alone takes a third of the time."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiable(
    function: Callable[..., Tensor],
    inputs: tuple[Tensor | None, ...],
    rest: tuple[Any, ...],
    gradients: tuple[Tensor, ...],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of inputs by plain PyTorch, in a way that can be derived again (``create_graph=True``).

    Args:
        function: The op's reference.
        inputs: Its tensors.
        rest: Its other arguments.
        gradients: Those of its outputs.
        needed: Whether the gradients of inputs are asked for; others are None.
    """
    # views: the same tensor may be given twice
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
    wanted = [t for t, need in zip(inputs, needed, strict=False) if need]
    found = iter(torch.autograd.grad(function(*inputs, *rest), wanted, gradients, create_graph=True))
    return tuple(next(found) if need else None for _, need in zip(inputs, needed, strict=False))
