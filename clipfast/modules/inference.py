"""Inference on the CPU: when weights that were packed once may serve, and keeping them as long as they are right."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from clipfast.modules import plainness
from clipfast.ops import dispatch, encoder
from clipfast.ops.fingerprint import Fingerprint, can_be_read

T = TypeVar("T")


class _Kept(NamedTuple):
    state: list[tuple[Tensor, int, int]]
    fingerprint: Fingerprint
    made: Any


# by the module that owns the weights, so that copying, pickling and moving a model know nothing of it; and by what was
# made, in which dtype
_kept: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], _Kept]] = WeakKeyDictionary()
_lock = threading.Lock()


def _count_changes(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Count a step as a change of its parameters, which PyTorch's fused optimizers forget."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None and p.device.type == "cpu" and not p.is_inference():
                torch.autograd.graph.increment_version(p)


register_optimizer_step_post_hook(_count_changes)


def product_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that products with packed weights are taken in for ``x``, or None where the modules compute.

    It is that of ``x``, or bfloat16 under autocast to it. Packed weights serve calls on the CPU that are made for their
    result alone: nobody derives, traces or looks on.
    """
    if not (
        not torch.compiler.is_compiling()
        and type(x) in (Tensor, nn.Parameter)
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
    ):
        return None
    if not torch.is_autocast_enabled("cpu"):
        return x.dtype
    return torch.bfloat16 if torch.get_autocast_dtype("cpu") == torch.bfloat16 else None


def kept(
    owner: nn.Module, parameters: Iterable[Tensor], x: Tensor, make: Callable[[torch.dtype], T], what: str = "products"
) -> T | None:
    """Return what ``make`` made of an owner's parameters, made anew if they were written to, moved or replaced since.

    Writes are known by PyTorch's count of them, and by a :class:`~clipfast.ops.fingerprint.Fingerprint`: what is
    written through ``.data``, NumPy or DLPack is not counted.

    Args:
        owner: What it is kept for; as long as this lives.
        parameters: The owner's parameters.
        x: What they are to be multiplied with.
        make: Is given the dtype of the products.
        what: Tells things apart that are made for one owner and dtype.

    Returns:
        None where it cannot be kept: :func:`product_dtype` is None, a parameter wants a gradient, is of another dtype
        (float32 serves under autocast), has gaps, is no plain tensor, or does not count its changes (it was made in
        inference mode).
    """
    dtype = product_dtype(x)
    if dtype is None:
        return None
    grad = torch.is_grad_enabled()
    stored = {x.dtype, torch.float32} if torch.is_autocast_enabled("cpu") else {x.dtype}
    state, dtypes = [], set()
    for p in parameters:
        dtypes.add(p.dtype)
        if (grad and p.requires_grad) or type(p) not in (nn.Parameter, Tensor) or p.is_inference():
            return None
        state.append((p, p.data_ptr(), p._version))
    if len(dtypes) != 1 or not dtypes <= stored:
        return None
    with _lock:
        found = _kept.get(owner, {}).get((what, dtype))
    if found is not None and len(found.state) == len(state):
        same = all(a is c and b == d and v == w for (a, b, v), (c, d, w) in zip(found.state, state, strict=True))
        if same and not found.fingerprint.changed():
            return found.made
    if not all(can_be_read(p) for p, _, _ in state):
        return None
    # before the weights are read: what is written meanwhile is seen later
    fingerprint = Fingerprint([p for p, _, _ in state])
    made = make(dtype)
    with _lock:
        _kept.setdefault(owner, {})[what, dtype] = _Kept(state, fingerprint, made)
    return made


def uncounted_writes(owner: nn.Module, just_used: bool = False) -> Callable[[], bool]:
    """Return what tells later whether weights of an owner that are packed now were written to uncounted since.

    Args:
        owner: What they are kept for.
        just_used: Whether they served a moment ago, and were looked at then.
    """
    with _lock:
        fingerprints = [one.fingerprint for one in _kept.get(owner, {}).values()]
    if not just_used or len(fingerprints) > 1:
        # what was packed of earlier weights, for another dtype say, tells nothing of these
        fingerprints = [fingerprint for fingerprint in fingerprints if not fingerprint.changed()]
    return lambda: any(fingerprint.changed() for fingerprint in fingerprints)


def forget_packed_weights(model: nn.Module) -> None:
    """Drop what inference on the CPU made of a model's weights; the next call packs them anew.

    Needed after writes of single values that PyTorch does not count (through ``.data``, NumPy or DLPack), to have them
    count at the next call. Without it they count after 256 calls at most, and larger writes at once:
    ``docs/inference.md`` says which.

    Args:
        model: A model of clipfast, one that it accelerated, or any module that holds the weights.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"forget_packed_weights(model): got {type(model).__name__}, expected a torch.nn.Module")
    # what owns packed weights may be a twin, which is no part of the model
    written = {id(p) for p in model.parameters()}
    with _lock:
        for owner, made in list(_kept.items()):
            if any(id(p) in written for one in made.values() for p, _, _ in one.state):
                del _kept[owner]


def linear(
    owner: nn.Module,
    x: Tensor,
    weight: Tensor,
    view: Callable[[Tensor], Tensor],
    bias: Tensor | None = None,
    first: int = 0,
) -> Tensor | None:
    """Return ``x @ view(weight)[first:].T + bias[first:]`` by the op library's product, or None where it cannot serve.

    Args:
        owner: Keeps the packed weight; a module that has no other.
        x: ``[rows, terms]``.
        weight: The parameter.
        view: What makes ``[columns, terms]`` of it.
        bias: ``[columns]``, a parameter too, or None.
        first: The first column that is wanted.
    """
    dtype = product_dtype(x)
    if (
        dtype is None
        or x.shape[1] % 2
        or encoder.prefers_onednn(dtype, x.shape[1])
        or encoder.native_unable(dtype) is not None
    ):
        return None

    def made(dtype: torch.dtype) -> tuple[Tensor, Tensor | None, int]:
        wanted = view(weight.detach().to(dtype))[first:].contiguous()
        added = None if bias is None else bias.detach()[first:].float().contiguous()
        return torch.ops.clipfast.pack_weight(wanted), added, wanted.shape[0]

    packed = kept(owner, (weight,) if bias is None else (weight, bias), x, made)
    return None if packed is None else torch.ops.clipfast.packed_linear(x.to(dtype).contiguous(), *packed)


def project(owner: nn.Module, x: Tensor, projection: Tensor | nn.Module | None) -> Tensor:
    """Return ``x @ projection``, ``[S, E]`` from ``[S, W]`` and ``[W, E]`` or a linear layer; ``x`` without any."""
    if projection is None:
        return x
    if isinstance(projection, nn.Module):
        if not plainness.is_untouched(projection, plainness.LINEARS) or type(projection.weight) is not nn.Parameter:
            return projection(x)
        projected = linear(owner, x, projection.weight, lambda weight: weight, projection.bias)
        return projection(x) if projected is None else projected
    projected = linear(owner, x, projection, lambda weight: weight.T)
    return x @ projection if projected is None else projected


def each_alone(forward: Callable[[Any], Tensor], batch: Any, invariant: Callable[[], bool]) -> Tensor:
    """Return ``forward(batch)``; of one row at a time where results may not depend on the batch, but would.

    Args:
        forward: Maps ``[B, ...]`` to ``[B, E]``.
        batch: What it is given: a tensor, or what has a length and splits as one.
        invariant: Whether ``forward`` gives a row the same bits in every batch.
    """
    if not dispatch.is_deterministic() or dispatch.leaves_clipfast() or len(batch) < 2 or invariant():
        return forward(batch)
    return torch.cat([forward(row) for row in batch.split(1)])
