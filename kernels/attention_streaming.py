"""Attention of sequences of any length: keys and values pass through the chip a tile at a time.

These kernels serve what :mod:`clipfast.kernels.attention_whole` does not: sequences that do not fit, packed
sequences of unknown lengths, and fp32, whose products take many more registers. A sequence of full tiles and one more
token (577 = 1 + 9 · 64) is a class token beside them: its key is where the softmax of every row starts, and its query
is one product of a row that a program of its own does.

Packed sequences lie one behind the other and ``cu_seqlens`` on the device says where. The grid needs the number of
sequences alone: ``splits`` programs share the tiles of a head of a sequence, however many it has. So nothing waits for
the device, and tiles start where a sequence starts: a row's result does not depend on its neighbours.

The backward pass is two kernels without atomics: one owns tiles of queries (dQ, and δ = rowsum(dO ∘ O) for the other),
the other tiles of keys (dK and dV).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from clipfast.kernels.aot import Loop, Work
from clipfast.kernels.attention_tiles import (
    NUMBERS,
    absorb,
    absorb_row,
    begin,
    heads_of,
    load_class_statistics,
    load_row,
    load_statistics,
    load_tile,
    row_gradients,
    score_gradients,
    score_gradients_by_query,
    signed,
    store_row,
    store_statistics,
    store_tile,
    widen,
)
from clipfast.kernels.launch import jit


@triton.jit
def sequence_bounds(cu_seqlens, batch, tokens, PACKED: tl.constexpr):
    """Return the row where a sequence starts, as int64, and its length.

    ``tokens`` is the length of every sequence, or of all together when packed. Offsets on a device are not checked
    elsewhere: whatever they are, they lead to no address outside the tensors.
    """
    if PACKED:
        start = tl.load(cu_seqlens + batch).to(tl.int64)
        end = tl.load(cu_seqlens + batch + 1).to(tl.int64)
        start = tl.minimum(tl.maximum(start, 0), tokens)
        length = (tl.minimum(tl.maximum(end, start), tokens) - start).to(tl.int32)
    else:
        start = batch * tokens
        length = tokens
    return start, length


@triton.jit
def own_sequence(
    qkv, cu_seqlens, batch_stride, token_stride, part_stride, head_stride, heads, tokens, splits,
    PACKED: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Return what a program works on.

    That is which of the ``splits`` programs of its head and sequence it is, the head, the sequence's first row (int64
    both) and its length, where queries, keys and values start, and the stride of their tokens in elements.
    """
    program = tl.program_id(0)
    sequence, split = program // splits, program % splits
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    start, length = sequence_bounds(cu_seqlens, batch, tokens, PACKED)
    offset = start * token_stride if PACKED else batch * batch_stride
    queries, keys, values, token_stride = heads_of(qkv, offset, head, token_stride, part_stride, head_stride, UNIT)
    return split, head, start, length, queries, keys, values, token_stride


@jit(do_not_specialize=NUMBERS)
def streaming_forward(
    qkv, out, lse, cu_seqlens, batch_stride, token_stride, part_stride, head_stride, heads, tokens, all_tokens, splits,
    log2_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CLASS_TOKEN: tl.constexpr, SIGN: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """``qkv [B, N, 3, H, D]`` (``[total, 3, H, D]``) to ``out [B·N, H·D]`` and ``lse [P, H, B·N]``."""
    split, head, start, length, queries, keys, values, token_stride = own_sequence(
        qkv, cu_seqlens, batch_stride, token_stride, part_stride, head_stride, heads, tokens, splits, PACKED, UNIT
    )
    out += start * (heads * D) + head * D
    second = widen(all_tokens) * heads
    lse += head * all_tokens + start

    START: tl.constexpr = 1 if CLASS_TOKEN else 0
    tiles = tl.cdiv(length - START, QUERIES)
    if CLASS_TOKEN:  # noqa: SIM102  # one is known to the compiler, the other is not
        if split == splits - 1:
            query = load_row(queries, D, BLOCK_D)
            top = signed(tl.sum(query * load_row(keys, D, BLOCK_D), 0), SIGN) * log2_scale
            total, acc = 1.0, load_row(values, D, BLOCK_D)
            for column in range(START, length, KEYS):
                offset = widen(column) * token_stride
                key = load_tile(keys + offset, token_stride, length, D, KEYS, BLOCK_D, True)
                value = load_tile(values + offset, token_stride, length, D, KEYS, BLOCK_D, True)
                top, total, acc = absorb_row(query, key, value, top, total, acc, log2_scale, SIGN)
            store_row(out, acc / total, D, BLOCK_D)
            first_row = tl.arange(0, 1)
            store_statistics(lse, second, first_row, length, first_row * 0.0 + top, first_row * 0.0 + total, EXACT)

    for tile in range(split, tiles, splits):
        first = START + tile * QUERIES
        rows = first + tl.arange(0, QUERIES)
        offset = widen(first)
        query = load_tile(
            queries + offset * token_stride, token_stride, length - first, D, QUERIES, BLOCK_D, CLASS_TOKEN
        )
        top, total, acc = begin(query, keys, values, log2_scale, QUERIES, D, BLOCK_D, SIGN, CLASS_TOKEN)
        end = tl.minimum(length, first + QUERIES) if CAUSAL else length
        for column in range(START, end, KEYS):
            step = widen(column) * token_stride
            key = load_tile(keys + step, token_stride, length - column, D, KEYS, BLOCK_D, CLASS_TOKEN)
            value = load_tile(values + step, token_stride, length - column, D, KEYS, BLOCK_D, CLASS_TOKEN)
            columns = column + tl.arange(0, KEYS)
            top, total, acc = absorb(
                query, key, value, rows, columns, length, top, total, acc, log2_scale,
                SIGN, CAUSAL, CLASS_TOKEN,
            )  # fmt: skip
        place = out + offset * (heads * D)
        store_tile(place, heads * D, length - first, acc / total[:, None], D, QUERIES, BLOCK_D, CLASS_TOKEN)
        store_statistics(lse, second, rows, length, top, total, EXACT)


@jit(do_not_specialize=NUMBERS)
def streaming_backward_queries(
    qkv, out, lse, delta, cu_seqlens, d_out, d_qkv, batch_stride, token_stride, part_stride, head_stride, heads, tokens,
    all_tokens, splits, scale, log2_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CLASS_TOKEN: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Write dQ of ``d_qkv [B·N or total, 3, H, D]`` and ``delta [H, B·N or total]``."""
    split, head, start, length, queries, keys, values, token_stride = own_sequence(
        qkv, cu_seqlens, batch_stride, token_stride, part_stride, head_stride, heads, tokens, splits, PACKED, UNIT
    )
    width = heads * D
    out += start * width + head * D
    d_out += start * width + head * D
    d_queries = d_qkv + start * (3 * width) + head * D
    second = widen(all_tokens) * heads
    lse += head * all_tokens + start
    delta += head * all_tokens + start

    START: tl.constexpr = 1 if CLASS_TOKEN else 0
    tiles = tl.cdiv(length - START, QUERIES)
    if CLASS_TOKEN:  # noqa: SIM102  # one is known to the compiler, the other is not
        if split == splits - 1:
            own_key, own_value = load_row(keys, D, BLOCK_D), load_row(values, D, BLOCK_D)
            class_query, class_grad = load_row(queries, D, BLOCK_D), load_row(d_out, D, BLOCK_D)
            class_top, class_grad = load_class_statistics(lse, second, class_grad, EXACT)
            class_mean = tl.sum(load_row(out, D, BLOCK_D) * class_grad, 0)
            weight = tl.exp2(tl.sum(class_query * own_key, 0) * log2_scale - class_top)
            d_class_query = weight * (tl.sum(class_grad * own_value, 0) - class_mean) * own_key
            for column in range(START, length, KEYS):
                step = widen(column) * token_stride
                key = load_tile(keys + step, token_stride, length, D, KEYS, BLOCK_D, True)
                value = load_tile(values + step, token_stride, length, D, KEYS, BLOCK_D, True)
                _by_key, d_by_key = row_gradients(
                    class_query[None, :], class_grad[None, :], class_top, class_mean, key, value, log2_scale
                )
                d_class_query += tl.sum(d_by_key[:, None] * key.to(tl.float32), 0)
            store_row(d_queries, d_class_query * scale, D, BLOCK_D)
            tl.store(delta, class_mean)

    for tile in range(split, tiles, splits):
        first = START + tile * QUERIES
        rows = first + tl.arange(0, QUERIES)
        offset, left = widen(first), length - first
        query = load_tile(queries + offset * token_stride, token_stride, left, D, QUERIES, BLOCK_D, CLASS_TOKEN)
        grad = load_tile(d_out + offset * width, width, left, D, QUERIES, BLOCK_D, CLASS_TOKEN)
        result = load_tile(out + offset * width, width, left, D, QUERIES, BLOCK_D, CLASS_TOKEN)
        top, grad = load_statistics(lse, second, rows, length, grad, EXACT)
        mean = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
        tl.store(delta + rows, mean, mask=rows < length)
        d_query = tl.zeros((QUERIES, BLOCK_D), tl.float32)
        if CLASS_TOKEN:
            class_key, class_value = load_row(keys, D, BLOCK_D), load_row(values, D, BLOCK_D)
            _by_row, d_by_row = row_gradients(
                query, grad, top, mean, class_key[None, :], class_value[None, :], log2_scale
            )
            d_query += d_by_row[:, None] * class_key[None, :]
        end = tl.minimum(length, first + QUERIES) if CAUSAL else length
        for column in range(START, end, KEYS):
            step = widen(column) * token_stride
            key = load_tile(keys + step, token_stride, length - column, D, KEYS, BLOCK_D, CLASS_TOKEN)
            value = load_tile(values + step, token_stride, length - column, D, KEYS, BLOCK_D, CLASS_TOKEN)
            columns = column + tl.arange(0, KEYS)
            d_scores = score_gradients_by_query(
                query, grad, top, mean, key, value, rows, columns, length, log2_scale,
                CAUSAL, CLASS_TOKEN,
            )  # fmt: skip
            d_query = tl.dot(d_scores.to(key.dtype), key, d_query, input_precision="ieee")
        place = d_queries + offset * (3 * width)
        store_tile(place, 3 * width, left, d_query * scale, D, QUERIES, BLOCK_D, CLASS_TOKEN)


@jit(do_not_specialize=NUMBERS)
def streaming_backward_keys(
    qkv, lse, delta, cu_seqlens, d_out, d_qkv, batch_stride, token_stride, part_stride, head_stride, heads, tokens,
    all_tokens, splits, scale, log2_scale, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CLASS_TOKEN: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of ``d_qkv [B·N or total, 3, H, D]``."""
    split, head, start, length, queries, keys, values, token_stride = own_sequence(
        qkv, cu_seqlens, batch_stride, token_stride, part_stride, head_stride, heads, tokens, splits, PACKED, UNIT
    )
    width = heads * D
    d_out += start * width + head * D
    d_keys = d_qkv + start * (3 * width) + head * D + width
    d_values = d_keys + width
    second = widen(all_tokens) * heads
    lse += head * all_tokens + start
    delta += head * all_tokens + start

    START: tl.constexpr = 1 if CLASS_TOKEN else 0
    tiles = tl.cdiv(length - START, KEYS)
    if CLASS_TOKEN:  # noqa: SIM102  # one is known to the compiler, the other is not
        if split == splits - 1:
            own_query, own_grad = load_row(queries, D, BLOCK_D), load_row(d_out, D, BLOCK_D)
            own_top, own_grad = load_class_statistics(lse, second, own_grad, EXACT)
            class_key, class_value = load_row(keys, D, BLOCK_D), load_row(values, D, BLOCK_D)
            weight = tl.exp2(tl.sum(own_query * class_key, 0) * log2_scale - own_top)
            d_class_value = weight * own_grad
            d_class_key = weight * (tl.sum(own_grad * class_value, 0) - tl.load(delta)) * own_query
            for row in range(START, length, QUERIES):
                offset = widen(row)
                query = load_tile(queries + offset * token_stride, token_stride, length, D, QUERIES, BLOCK_D, True)
                grad = load_tile(d_out + offset * width, width, length, D, QUERIES, BLOCK_D, True)
                rows = row + tl.arange(0, QUERIES)
                top, grad = load_statistics(lse, second, rows, length, grad, EXACT)
                mean = tl.load(delta + rows)
                by_row, d_by_row = row_gradients(
                    query, grad, top, mean, class_key[None, :], class_value[None, :], log2_scale
                )
                d_class_key += tl.sum(d_by_row[:, None] * query.to(tl.float32), 0)
                d_class_value += tl.sum(by_row[:, None] * grad.to(tl.float32), 0)
            store_row(d_keys, d_class_key * scale, D, BLOCK_D)
            store_row(d_values, d_class_value, D, BLOCK_D)

    for tile in range(split, tiles, splits):
        first = START + tile * KEYS
        columns = first + tl.arange(0, KEYS)
        offset, left = widen(first), length - first
        key = load_tile(keys + offset * token_stride, token_stride, left, D, KEYS, BLOCK_D, CLASS_TOKEN)
        value = load_tile(values + offset * token_stride, token_stride, left, D, KEYS, BLOCK_D, CLASS_TOKEN)
        d_key = tl.zeros((KEYS, BLOCK_D), tl.float32)
        d_value = tl.zeros((KEYS, BLOCK_D), tl.float32)
        if CLASS_TOKEN:
            class_query, class_grad = load_row(queries, D, BLOCK_D), load_row(d_out, D, BLOCK_D)
            class_top, class_grad = load_class_statistics(lse, second, class_grad, EXACT)
            class_delta = tl.load(delta)
            by_key, d_by_key = row_gradients(
                class_query[None, :], class_grad[None, :], class_top, class_delta, key, value, log2_scale
            )
            d_key += d_by_key[:, None] * class_query[None, :]
            d_value += by_key[:, None] * class_grad[None, :]
        # queries before the first key of the tile do not see it
        begin = first // QUERIES * QUERIES if CAUSAL else START
        for row in range(begin, length, QUERIES):
            step = widen(row)
            query = load_tile(
                queries + step * token_stride, token_stride, length - row, D, QUERIES, BLOCK_D, CLASS_TOKEN
            )
            grad = load_tile(d_out + step * width, width, length - row, D, QUERIES, BLOCK_D, CLASS_TOKEN)
            rows = row + tl.arange(0, QUERIES)
            top, grad = load_statistics(lse, second, rows, length, grad, EXACT)
            mean = tl.load(delta + rows, mask=rows < length, other=0.0)
            weights, d_scores = score_gradients(
                query, grad, top, mean, key, value, rows, columns, length, log2_scale,
                CAUSAL, CLASS_TOKEN,
            )  # fmt: skip
            d_value = tl.dot(weights.to(grad.dtype), grad, d_value, input_precision="ieee")
            d_key = tl.dot(d_scores.to(query.dtype), query, d_key, input_precision="ieee")
        place = offset * (3 * width)
        store_tile(d_keys + place, 3 * width, left, d_key * scale, D, KEYS, BLOCK_D, CLASS_TOKEN)
        store_tile(d_values + place, 3 * width, left, d_value, D, KEYS, BLOCK_D, CLASS_TOKEN)


def aot_work(name: str, values: Mapping[str, Any]) -> Work:
    """Return the trips of a kernel's loops, averages of the ``splits`` programs of a sequence, and what it moves.

    The lengths of packed sequences are on the device alone: 20 tokens each are assumed, as captions have.
    """
    by_keys = name == "streaming_backward_keys"
    tile, step = (values[side] for side in (("KEYS", "QUERIES") if by_keys else ("QUERIES", "KEYS")))
    length = (20 if values["PACKED"] else values["tokens"]) - values["CLASS_TOKEN"]
    tiles, steps = -(-length // tile), -(-length // step)
    inner = float(steps)
    if values["CAUSAL"]:
        # of the tiles beside the diagonal or on it, a program's average
        first = [(own * tile) // step for own in range(tiles)]
        last = [min(steps, -(-(own + 1) * tile // step)) for own in range(tiles)]
        inner = (sum(steps - f for f in first) if by_keys else sum(last)) / tiles
    loops = [Loop(tiles / values["splits"], (Loop(inner),))]
    if values["CLASS_TOKEN"]:
        loops.insert(0, Loop(steps / values["splits"]))
    written = {"streaming_backward_queries": 1 / 3, "streaming_backward_keys": 2 / 3}
    return Work(tuple(loops), {"d_qkv": written[name]} if name in written else {})
