"""Packed sequences by PyTorch's own FlashAttention for sequences of any lengths, as ``varlen_attn`` calls it.

It serves 16 bits on cards of compute capability 8.0 and more. Forward it is one launch, backward four: FlashAttention's
three, and the stack of three gradients. FlashAttention adds queries' gradients up by atomics, in no order of their own,
so it does not serve under ``deterministic()``.

``torch.nn.attention.varlen.varlen_attn`` is an operator in Python around the one that is called here. It sets a
random state to zero that nothing reads, and two gradients that nothing wants: three launches more. With the kernels
mocked it took the host 560 µs, forward and backward, and the operator itself 240. It is called where that one has
changed.

Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clipfast.ops import attention_packed, switches
from clipfast.ops.switches import constant_when_compiled

DESCRIPTION = "PyTorch's FlashAttention for sequences of any lengths, varlen_attn"

_LARGEST_HEAD = 192


def attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    """Return ``[total, H·D]`` from ``qkv [total, 3, H, D]`` and offsets ``cu_seqlens [S + 1]``."""
    if torch.compiler.is_compiling():
        return _traced(qkv, causal, cu_seqlens, scale)
    return _attention(qkv, causal, cu_seqlens, scale)


def _attention(qkv: Tensor, causal: bool, cu_seqlens: Tensor, scale: float) -> Tensor:
    longest = attention_packed.longest(cu_seqlens, qkv.shape[0])
    if not longest:
        return qkv[:, 0].flatten(1)
    offsets = attention_packed.on_device(cu_seqlens, qkv.device)
    query, key, value = _readable(qkv).unbind(1)
    return _call(query, key, value, offsets, offsets, longest, longest, causal, scale).flatten(1)


_traced = attention_packed.operator("attention_varlen", _attention)


def single_query(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    """Return ``[S, H·D]`` from ``query [S, H, D]``, ``key`` and ``value`` ``[total, H, D]`` and offsets ``[S + 1]``."""
    longest = attention_packed.longest(cu_seqlens, key.shape[0], "single_query_attention", may_be_empty=False)
    if not longest:
        return query.flatten(1)
    offsets = attention_packed.on_device(cu_seqlens, query.device)
    queries = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device)
    query, key, value = (_readable(t) for t in (query, key, value))
    return _call(query, key, value, queries, offsets, 1, longest, False, scale).flatten(1)


def refusal(qkv: Tensor, causal: bool, cu_seqlens: Tensor | None, scale: float) -> str | None:
    """Return why it cannot serve a call of attention, or None."""
    return _refusal(qkv, cu_seqlens, scale)


def single_query_refusal(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> str | None:
    """Return why it cannot serve a call of attention of one query a sequence, or None."""
    if torch.compiler.is_compiling():
        return "how many keys there are is data, which a compiler does not see"
    return _refusal(query, cu_seqlens, scale)


def _refusal(x: Tensor, cu_seqlens: Tensor | None, scale: float) -> str | None:
    if cu_seqlens is None:
        return "it is for packed sequences alone"
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(x.dtype).removeprefix('torch.')} is not served (float16 and bfloat16 are)"
    head_dim = x.shape[-1]
    if head_dim % 8 or head_dim > _LARGEST_HEAD:
        return f"head_dim {head_dim} is not served (multiples of 8 up to {_LARGEST_HEAD} are)"
    if switches.is_deterministic():
        return "its backward pass adds up by atomics, in no order of its own"
    return _unavailable(x.device.type, x.device.index)


@constant_when_compiled
def _unavailable(device_type: str, index: int | None) -> str | None:
    if device_type != "cuda" or torch.version.cuda is None:
        return f"it runs on NVIDIA GPUs, the tensors are on {device_type}"
    if _operator() is None and _function() is None:
        return "PyTorch has no varlen_attn with a scale and a window, as 2.11 has"
    if not torch.backends.cuda.is_flash_attention_available():
        return "PyTorch was built without FlashAttention"
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"it needs compute capability 8.0, the card has {major}.{minor}"


# what is relied on: arguments up to here, and the scale by its name
_ARGUMENTS = ["query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k"]
_ARGUMENTS += ["dropout_p", "is_causal", "return_debug_mask"]


@functools.cache
def _operator() -> Callable[..., Any] | None:
    """Return PyTorch's operator, which has gradients, or None where it is another than is known here."""
    packet = getattr(torch.ops.aten, "_flash_attention_forward", None)
    operator = getattr(packet, "default", None)
    if operator is None:
        return None
    names = [argument.name for argument in operator._schema.arguments]
    return operator if names[: len(_ARGUMENTS)] == _ARGUMENTS and "scale" in names else None


@functools.cache
def _function() -> Callable[..., Any] | None:
    """Return ``varlen_attn``, or None where it takes no scale or no window."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return None
    from torch.nn.attention import varlen

    parameters = inspect.signature(varlen.varlen_attn).parameters
    return varlen.varlen_attn if {"scale", "window_size"} <= parameters.keys() else None


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    of_queries: Tensor,
    of_keys: Tensor,
    most_queries: int,
    most_keys: int,
    causal: bool,
    scale: float,
) -> Tensor:
    packed = query, key, value, of_queries, of_keys, most_queries, most_keys
    operator = _operator()
    if operator is not None:
        return operator(*packed, 0.0, causal, False, scale=scale)[0]
    # a window that ends at the query itself
    return _function()(*packed, scale=scale, window_size=(-1, 0 if causal else -1))


def _readable(x: Tensor) -> Tensor:
    """Return ``[…, D]`` as it is, or a copy where the kernel could not read a head's values 16 bytes at a time."""
    aligned = x.stride(-1) == 1 and all(s % 8 == 0 for s in x.stride()[:-1]) and x.storage_offset() % 8 == 0
    return x if aligned else x.contiguous()
