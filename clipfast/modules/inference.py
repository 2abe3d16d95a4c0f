"""Inference on the CPU: when weights that were packed once may serve, and keeping them as long as they are right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from clipfast.ops import dispatch, encoder

T = TypeVar("T")

# values of each parameter that are looked at again before what was made of it is used
_SAMPLES = 16
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


class _Kept(NamedTuple):
    state: list[tuple[Tensor, int, int]]
    samples: list[Tensor]
    values: Tensor
    made: Any


# by the module that owns the weights, so that copying, pickling and moving a model know nothing of it
_kept: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()
_lock = threading.Lock()


def _count_changes(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count a step as a change of its parameters, which PyTorch's fused optimizers forget."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.device.type == "cpu" and not p.is_inference():
                torch.autograd.graph.increment_version(p)


register_optimizer_step_post_hook(_count_changes)


def applies(x: Tensor) -> bool:
    """Return whether a call computes on the CPU, for its result alone: nobody derives, traces, casts or looks on."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
    )


def kept(owner: nn.Module, parameters: Iterable[Tensor], dtype: torch.dtype, make: Callable[[], T]) -> T | None:
    """Return what ``make`` made of an owner's parameters, made anew if they were written to, moved or replaced since.

    Writes are known by PyTorch's count of them, and by some values of every parameter: what is written through
    ``.data`` or NumPy is not counted.

    None where it cannot be kept: a parameter wants a gradient, is of another dtype, is no plain tensor, or does not
    count its changes (it was made in inference mode).
    """
    grad = torch.is_grad_enabled()
    state = []
    for p in parameters:
        if p.dtype != dtype or (grad and p.requires_grad) or type(p) not in (nn.Parameter, Tensor) or p.is_inference():
            return None
        state.append((p, p.data_ptr(), p._version))
    with _lock:
        found = _kept.get(owner)
    if found is not None and len(found.state) == len(state):
        same = all(a is c and b == d and v == w for (a, b, v), (c, d, w) in zip(found.state, state, strict=True))
        if same and torch.equal(torch.cat(found.samples), found.values):
            return found.made
    samples = [_sample(p) for p, _, _ in state]
    # before the weights are read: what is written meanwhile is seen the next time
    values = torch.cat(samples)
    made = make()
    with _lock:
        _kept[owner] = _Kept(state, samples, values, made)
    return made


def _sample(parameter: Tensor) -> Tensor:
    """Return a view of some of a parameter's values, as bits."""
    bits = parameter.detach().view(_BITS[parameter.dtype])
    flat = bits.view(-1) if bits.is_contiguous() else bits[(0,) * (bits.dim() - 1)]
    return flat[:: max(1, flat.shape[0] // _SAMPLES)]


def linear(owner: nn.Module, x: Tensor, weight: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor | None:
    """Return ``x @ view(weight).T`` by the op library's own product, or None where it cannot serve.

    Args:
        owner: Keeps the packed weight; a module that has no other.
        x: ``[rows, terms]``.
        weight: The parameter.
        view: What makes ``[columns, terms]`` of it.
    """
    if not applies(x) or x.shape[1] % 2 or encoder.prefers_onednn(x.dtype):
        return None
    if encoder.native_unable(x.dtype) is not None:
        return None
    packed = kept(owner, (weight,), x.dtype, lambda: _pack(view(weight.detach())))
    return None if packed is None else torch.ops.clipfast.packed_linear(x.contiguous(), packed[0], None, packed[1])


def project(owner: nn.Module, x: Tensor, projection: Tensor | None) -> Tensor:
    """Return ``x @ projection``, ``[S, E]`` from ``[S, W]`` and ``[W, E]``; ``x`` where there is no projection."""
    if projection is None:
        return x
    projected = linear(owner, x, projection, lambda weight: weight.T)
    return x @ projection if projected is None else projected


def _pack(weight: Tensor) -> tuple[Tensor, int]:
    return torch.ops.clipfast.pack_weight(weight.contiguous()), weight.shape[0]


def each_alone(forward: Callable[[Tensor], Tensor], batch: Tensor, invariant: Callable[[], bool]) -> Tensor:
    """Return ``forward(batch)``; of one row at a time where results may not depend on the batch, but would.

    Args:
        forward: Maps ``[B, ...]`` to ``[B, E]``.
        batch: What it is given.
        invariant: Whether ``forward`` gives a row the same bits in every batch.
    """
    if not dispatch.is_deterministic() or batch.shape[0] < 2 or invariant():
        return forward(batch)
    return torch.cat([forward(row) for row in batch.split(1)])
