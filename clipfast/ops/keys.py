"""What of a call decides which implementation serves it (:class:`clipfast.ops.rules.Key`), taken from its tensors."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clipfast.ops import switches
from clipfast.ops.call_classes import LARGE, LARGE_ON_HOST, LENGTHS, WIDTHS, Key, bound

# devices on which a launch takes as long as a small call
_SIZED = frozenset({"cuda"})
# ops that take longer to be recorded for a backward pass by the op library than by PyTorch
_BOOKKEPT = frozenset({"layer_norm", "add_layer_norm"})

_is_grad_enabled = torch.is_grad_enabled
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
# os.environ encodes a name at every look-up, which takes as long as all the rest of a signature
_environment: Any = getattr(os.environ, "_data", os.environ)
_INTERPRET: Any = os.environ.encodekey("TRITON_INTERPRET") if _environment is not os.environ else "TRITON_INTERPRET"


# what the op library takes: a subclass brings its own meaning of every operator
PLAIN = (Tensor, torch.nn.Parameter)

_functorch_level = torch._C._functorch.maybe_current_level


def is_transformed() -> bool:
    """Return whether ``torch.func`` or forward-mode differentiation is at work."""
    return _functorch_level() is not None or forward_ad._current_level >= 0


def moment(x: Tensor) -> tuple[Any, ...]:
    """Return what a choice depends on besides its arguments and the switches of :mod:`clipfast.ops.switches`.

    Args:
        x: A tensor of the call, on whose device it runs.
    """
    return _is_grad_enabled(), _any_autocast() and autocast_dtype(x), _environment.get(_INTERPRET)


def place(x: Tensor, elements: int, *others: Tensor) -> tuple[Any, ...]:
    """Return where a call on rows runs, whether it is a large one, and on the CPU what the op library asks for.

    Args:
        x: A tensor of the call.
        elements: How many of them make it large off the CPU.
        *others: The others, which may lie elsewhere.
    """
    if x.is_cpu:
        return (
            x.numel() >= LARGE_ON_HOST, type(x), *map(type, others), *[t.is_cpu for t in others], x.layout,
            _functorch_level(), forward_ad._current_level,
        )  # fmt: skip
    return x.device, x.numel() >= elements, tuple(t.get_device() for t in others)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast computes in on the device of ``x``, or None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def of_rows(op: str, x: Tensor, *others: Tensor | None, scale: int = 1, **more: Any) -> Key:
    """Return the key of an op that works on rows.

    Args:
        op: The op.
        x: ``[..., C]``.
        *others: The other tensors whose dtypes count.
        scale: How many times as wide as the residual stream the rows are.
        **more: Other fields of the key.
    """
    dtypes = tuple(name_of(t.dtype) for t in (x, *others) if t is not None)
    large, compiled = is_large(x, LARGE * scale), torch.compiler.is_compiling()
    if x.is_cpu and not sizes_count(x.device) and op in _BOOKKEPT and torch.is_grad_enabled():
        large = is_large(x, LARGE_ON_HOST, sized=True)
    return Key(op, dtypes, **modes(x), compiled=compiled, large=large, width=bound(x.shape[-1], WIDTHS), **more)


def of_attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> Key:
    """Return the key of a call of attention, ``qkv [B, N, 3, H, D]`` or ``[total, 3, H, D]``."""
    tokens = None if cu_seqlens is not None else bound(qkv.shape[1], LENGTHS)
    return Key(
        "attention",
        (name_of(qkv.dtype),),
        **modes(qkv),
        large=is_large(qkv, 3 * LARGE),  # three values a channel of the stream
        width=int(qkv.shape[-1]),
        tokens=tokens,
        causal=bool(causal),
    )


def is_large(x: Tensor, elements: int, *, sized: bool | None = None) -> bool | None:
    """Return :attr:`Key.large` of a call with ``x``, which is large from so many elements on.

    Args:
        x: A tensor of the call.
        elements: How many.
        sized: Whether sizes count; by default as :func:`sizes_count` says.
    """
    if not (sizes_count(x.device) if sized is None else sized):
        return None
    # A choice that depended on the batch would make its results depend on it, and a compiler compile for every batch
    if switches.are_calls_large() or torch.compiler.is_compiling():
        return True
    size = x.numel()
    # a symbol, where a call is traced for any batch
    return not isinstance(size, int) or size >= elements


def sizes_count(device: torch.device) -> bool:
    """Return whether small calls and large ones are of two classes on a device."""
    return device.type in _SIZED


def modes(x: Tensor) -> dict[str, bool]:
    """Return the fields of a key that hold for a call wherever its tensors come from."""
    return {"training": torch.is_grad_enabled(), "autocast": torch.is_autocast_enabled(x.device.type)}


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype's name without the module's."""
    return str(dtype).removeprefix("torch.")
