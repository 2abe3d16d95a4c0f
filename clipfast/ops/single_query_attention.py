"""Attention with one query a sequence: what a tower's last block needs when one token of it is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import attention_packed, attention_varlen, dispatch, keys, length_buckets

_OP = "single_query_attention"


def single_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    *,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Multi-head attention, ``softmax(scale · q Kᵀ) V`` for every head, of one query a sequence.

    Args:
        query: ``[S, H·D]``, floating point.
        key: ``[S, N, H·D]``; with ``cu_seqlens``, ``[total, H·D]``. In the dtype of ``query``; views are read in place.
        value: As ``key``.
        num_heads: The number of heads, H.
        lengths: ``[S]``: a sequence's query attends to its first ``lengths[s]`` keys; by default to all N.
        cu_seqlens: Offsets ``[S + 1]`` (int32 or int64) of the sequences' keys, packed one behind the other, none of
            them empty. They are read on the host: where they lie on a GPU, that waits for it.
        scale: The factor before the softmax; by default ``D ** -0.5``.

    Returns:
        ``[S, H·D]`` in the dtype of ``query``.

    Raises:
        TypeError: ``query`` is not floating point.
        ValueError: The shapes do not fit, a sequence is empty, or both ``lengths`` and ``cu_seqlens`` came.
    """
    return dispatch.call(_OP, query, key, value, num_heads, lengths, cu_seqlens, scale)


# twice: what the public function takes
def _prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """Check the arguments; return ``query [S, H, D]``, ``key`` and ``value`` ``[…, H, D]`` and the scale."""
    op = _OP
    if not query.is_floating_point():
        raise TypeError(f"{op}(query): got {query.dtype}, expected a floating-point dtype")
    if query.dim() != 2 or num_heads < 1 or query.shape[1] % num_heads:
        raise ValueError(
            f"{op}(query): got shape {tuple(query.shape)}, expected [S, H·D] with H = num_heads = {num_heads}"
        )
    if lengths is not None and cu_seqlens is not None:
        raise ValueError(f"{op}(lengths): got lengths and cu_seqlens, expected one of them")
    sequences, width = query.shape
    lead = ("total",) if cu_seqlens is not None else (sequences, "N")
    for name, tensor in (("key", key), ("value", value)):
        fits = tensor.dim() == len(lead) + 1 and tensor.shape[-1] == width and tensor.shape == key.shape
        if not fits or (cu_seqlens is None and (tensor.shape[0] != sequences or tensor.shape[1] == 0)):
            shape = ", ".join(map(str, (*lead, width)))
            raise ValueError(f"{op}({name}): got shape {tuple(tensor.shape)}, expected [{shape}]")
    for name, tensor, count in (("lengths", lengths, sequences), ("cu_seqlens", cu_seqlens, sequences + 1)):
        if tensor is not None and tensor.shape != (count,):
            raise ValueError(f"{op}({name}): got shape {tuple(tensor.shape)}, expected [{count}]")
    query, key, value = (t.unflatten(-1, (num_heads, -1)) for t in (query, key, value))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    return query, key, value, lengths, cu_seqlens, scale


def _visible(key: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Return ``[S, 1, 1, N]``, whether a sequence's query attends to a key; None where it attends to all."""
    if lengths is None:
        return None
    return (torch.arange(key.shape[1], device=key.device) < lengths[:, None])[:, None, None]


def _dense(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, scale: float) -> Tensor:
    out = F.scaled_dot_product_attention(
        query[:, :, None], key.transpose(1, 2), value.transpose(1, 2), attn_mask=visible, scale=scale
    )
    return out.flatten(1)


def _torch(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    if cu_seqlens is None:
        return _dense(query, key, value, _visible(key, lengths), scale)
    run = _by_length if query.device.type == "cpu" else _in_buckets
    return run(query, key, value, cu_seqlens, scale)


def _by_length(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    groups = attention_packed.groups_of(cu_seqlens, key, _OP, may_be_empty=False)
    if groups.tokens is not None:
        key, value = (attention_packed.permute(t, *groups.tokens) for t in (key, value))
        query = attention_packed.permute(query, *groups.sequences)
    parts = []
    sizes = [n * count for n, count in groups.counts]
    queries = query.split([count for _, count in groups.counts])
    for q, k, v, (n, _) in zip(queries, key.split(sizes), value.split(sizes), groups.counts, strict=True):
        parts.append(_dense(q, k.unflatten(0, (-1, n)), v.unflatten(0, (-1, n)), None, scale))
    out = torch.cat(parts) if parts else query.flatten(1)
    return out if groups.tokens is None else attention_packed.permute(out, *reversed(groups.sequences))


def _in_buckets(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    buckets = attention_packed.buckets_of(cu_seqlens, key, _OP, may_be_empty=False)
    if buckets is None:
        return query.flatten(1)
    if buckets.sequences is not None:
        query = attention_packed.permute(query, *buckets.sequences)
    padded = (buckets.split(length_buckets.pad(t, buckets)) for t in (key, value))
    queries = query.split([b.count for b in buckets.sizes])
    parts = [_dense(*tensors, scale) for tensors in zip(queries, *padded, buckets.masks(), strict=True)]
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return out if buckets.sequences is None else attention_packed.permute(out, *reversed(buckets.sequences))


def _reference(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, scale: float
) -> Tensor:
    """The specification: every weight is formed, one sequence at a time where they are packed."""
    if cu_seqlens is not None:
        attention_packed.check(cu_seqlens, key.shape[0], _OP, may_be_empty=False)
        ends = cu_seqlens.tolist()[1:-1]
        parts = zip(query.split(1), key.tensor_split(ends), value.tensor_split(ends), strict=True)
        return torch.cat([_reference(q, k[None], v[None], None, None, scale) for q, k, v in parts])
    scores = (query[:, :, None] * scale) @ key.permute(0, 2, 3, 1)
    visible = _visible(key, lengths)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(dim=-1) @ value.transpose(1, 2)).flatten(1)


def _signature(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, lengths: Tensor | None, cu_seqlens: Tensor | None,
    scale: float | None,
) -> tuple[Any, ...]:  # fmt: skip
    scale = None if scale is None else float(scale)
    given = tuple(None if t is None else t.shape for t in (lengths, cu_seqlens))
    return query.shape, key.shape, value.shape, num_heads, given, scale, query.dtype, query.device, keys.moment(query)


def _bind(
    run: Callable[..., Tensor], request: tuple[Any, ...], query: Tensor, key: Tensor, value: Tensor, *_: object
) -> Callable[..., Tensor]:
    of_query, of_key, scale = tuple(request[0].shape), tuple(request[1].shape), request[5]

    def bound(
        query: Tensor, key: Tensor, value: Tensor, num_heads: int, lengths: Tensor | None, cu_seqlens: Tensor | None,
        _: float | None,
    ) -> Tensor:  # fmt: skip
        return run(query.view(*of_query), key.view(*of_key), value.view(*of_key), lengths, cu_seqlens, scale)

    return bound


dispatch.register(
    _OP,
    _prepare,
    dispatch.Implementation(
        "torch", attention_varlen.DESCRIPTION, attention_varlen.single_query, attention_varlen.single_query_refusal
    ),
    dispatch.Implementation("torch", "scaled_dot_product_attention", _torch),
    dispatch.Implementation("reference", "explicit softmax in plain PyTorch", _reference),
    signature=_signature,
    bind=_bind,
)
