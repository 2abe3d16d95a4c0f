"""Attention of sequences whose keys and values fit on chip: one program owns one head of one sequence.

Keys and values are read once, as one tile or two whose sizes add up to little more than the sequence: Triton's tiles
are powers of two, and 77 tokens are 64 + 16 (1.04 × 77) where one tile would be 128 (1.66 × 77). A sequence of 257
tokens is a class token beside 256 others: its key is where the softmax of every row starts, its query is a product of
one row, and the tiles are exact.

The backward pass is one kernel. The program sees every query of its keys and every key of its queries, so dQ, dK and
dV are final when it ends: no atomics, no second pass, the same sums in the same order every time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from clipfast.kernels.aot import Loop, Work
from clipfast.kernels.attention_tiles import (
    NUMBERS,
    absorb,
    absorb_row,
    backpropagate,
    begin,
    heads_of,
    load_row,
    load_tile,
    row_gradients,
    signed,
    store_row,
    store_tile,
)
from clipfast.kernels.launch import jit


@jit(do_not_specialize=NUMBERS)
def whole_forward(
    qkv, out, lse, batch_stride, token_stride, part_stride, head_stride, heads, tokens, all_tokens, splits,
    log2_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS_0: tl.constexpr, KEYS_1: tl.constexpr,
    CLASS_TOKEN: tl.constexpr, SIGN: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``qkv [B, N, 3, H, D]`` to ``out [B, N, H·D]`` and ``lse [H, B·N]``; ``splits`` programs share the queries."""
    program = tl.program_id(0)
    sequence, split = program // splits, program % splits
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    offset = batch * batch_stride
    queries, keys, values, token_stride = heads_of(qkv, offset, head, token_stride, part_stride, head_stride, UNIT)
    out += batch * tokens * (heads * D) + head * D
    lse += head * all_tokens + batch * tokens

    # the first token of the first tile
    START: tl.constexpr = 1 if CLASS_TOKEN else 0
    first_key, first_value = keys + START * token_stride, values + START * token_stride
    key_0 = load_tile(first_key, token_stride, tokens, D, KEYS_0, BLOCK_D, CLASS_TOKEN)
    value_0 = load_tile(first_value, token_stride, tokens, D, KEYS_0, BLOCK_D, CLASS_TOKEN)
    if KEYS_1:
        offset_1 = KEYS_0 * token_stride
        key_1 = load_tile(first_key + offset_1, token_stride, tokens - KEYS_0, D, KEYS_1, BLOCK_D, CLASS_TOKEN)
        value_1 = load_tile(first_value + offset_1, token_stride, tokens - KEYS_0, D, KEYS_1, BLOCK_D, CLASS_TOKEN)
    if CLASS_TOKEN:  # noqa: SIM102  # one is known to the compiler, the other is not
        # before the loop: here the tile is still in registers, ready for a product row by row
        if split == 0:
            query = load_row(queries, D, BLOCK_D)
            top = signed(tl.sum(query * load_row(keys, D, BLOCK_D), 0), SIGN) * log2_scale
            acc = load_row(values, D, BLOCK_D)
            top, total, acc = absorb_row(query, key_0, value_0, top, 1.0, acc, log2_scale, SIGN)
            store_row(out, acc / total, D, BLOCK_D)
            tl.store(lse, top + tl.log2(total))

    for tile in range(split, tl.cdiv(tokens - START, QUERIES), splits):
        first = START + tile * QUERIES
        rows = first + tl.arange(0, QUERIES)
        query = load_tile(
            queries + first * token_stride, token_stride, tokens - first, D, QUERIES, BLOCK_D, CLASS_TOKEN
        )
        top, total, acc = begin(query, keys, values, log2_scale, QUERIES, D, BLOCK_D, SIGN, CLASS_TOKEN)
        columns = START + tl.arange(0, KEYS_0)
        top, total, acc = absorb(
            query, key_0, value_0, rows, columns, tokens, top, total, acc, log2_scale,
            SIGN, CAUSAL, CLASS_TOKEN,
        )  # fmt: skip
        if KEYS_1:
            columns_1 = START + KEYS_0 + tl.arange(0, KEYS_1)
            top, total, acc = absorb(
                query, key_1, value_1, rows, columns_1, tokens, top, total, acc, log2_scale,
                SIGN, CAUSAL, CLASS_TOKEN,
            )  # fmt: skip
        place = out + first * (heads * D)
        store_tile(place, heads * D, tokens - first, acc / total[:, None], D, QUERIES, BLOCK_D, CLASS_TOKEN)
        tl.store(lse + rows, top + tl.log2(total), mask=rows < tokens)


@jit(do_not_specialize=NUMBERS)
def whole_backward(
    qkv, out, lse, d_out, d_qkv, batch_stride, token_stride, part_stride, head_stride, heads, tokens, all_tokens, scale,
    log2_scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS_0: tl.constexpr, KEYS_1: tl.constexpr,
    CLASS_TOKEN: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """``d_qkv [B, N, 3, H, D]`` from ``d_out [B, N, H·D]`` and what the forward pass read and wrote."""
    sequence = tl.program_id(0)
    batch, head = (sequence // heads).to(tl.int64), (sequence % heads).to(tl.int64)
    offset = batch * batch_stride
    queries, keys, values, token_stride = heads_of(qkv, offset, head, token_stride, part_stride, head_stride, UNIT)
    width = heads * D
    place = batch * tokens * width + head * D
    out += place
    d_out += place
    d_queries = d_qkv + batch * tokens * (3 * width) + head * D
    d_keys = d_queries + width
    d_values = d_keys + width
    lse += head * all_tokens + batch * tokens

    START: tl.constexpr = 1 if CLASS_TOKEN else 0
    if CLASS_TOKEN:
        # every query against its key, all at once: sums kept through the loop below would not fit the registers, and
        # neither would these tiles beside those that stay
        class_key, class_value = load_row(keys, D, BLOCK_D), load_row(values, D, BLOCK_D)
        class_query, class_grad = load_row(queries, D, BLOCK_D), load_row(d_out, D, BLOCK_D)
        class_top, class_delta = tl.load(lse), tl.sum(load_row(out, D, BLOCK_D) * class_grad, 0)
        weight = tl.exp2(tl.sum(class_query * class_key, 0) * log2_scale - class_top)
        d_score = weight * (tl.sum(class_grad * class_value, 0) - class_delta)
        others = 1 + tl.arange(0, KEYS_0)
        all_queries = load_tile(queries + token_stride, token_stride, tokens, D, KEYS_0, BLOCK_D, True)
        all_grads = load_tile(d_out + width, width, tokens, D, KEYS_0, BLOCK_D, True)
        all_results = load_tile(out + width, width, tokens, D, KEYS_0, BLOCK_D, True)
        all_deltas = tl.sum(all_results.to(tl.float32) * all_grads.to(tl.float32), 1)
        by_query, d_by_query = row_gradients(
            all_queries,
            all_grads,
            tl.load(lse + others),
            all_deltas,
            class_key[None, :],
            class_value[None, :],
            log2_scale,
        )
        d_class_key = d_score * class_query + tl.sum(d_by_query[:, None] * all_queries.to(tl.float32), 0)
        d_class_value = weight * class_grad + tl.sum(by_query[:, None] * all_grads.to(tl.float32), 0)
        store_row(d_keys, d_class_key * scale, D, BLOCK_D)
        store_row(d_values, d_class_value, D, BLOCK_D)

    first_key, first_value = keys + START * token_stride, values + START * token_stride
    key_0 = load_tile(first_key, token_stride, tokens, D, KEYS_0, BLOCK_D, CLASS_TOKEN)
    value_0 = load_tile(first_value, token_stride, tokens, D, KEYS_0, BLOCK_D, CLASS_TOKEN)
    d_key_0 = tl.zeros((KEYS_0, BLOCK_D), tl.float32)
    d_value_0 = tl.zeros((KEYS_0, BLOCK_D), tl.float32)
    if KEYS_1:
        offset_1 = KEYS_0 * token_stride
        key_1 = load_tile(first_key + offset_1, token_stride, tokens - KEYS_0, D, KEYS_1, BLOCK_D, CLASS_TOKEN)
        value_1 = load_tile(first_value + offset_1, token_stride, tokens - KEYS_0, D, KEYS_1, BLOCK_D, CLASS_TOKEN)
        d_key_1 = tl.zeros((KEYS_1, BLOCK_D), tl.float32)
        d_value_1 = tl.zeros((KEYS_1, BLOCK_D), tl.float32)
    if CLASS_TOKEN:
        # its query against every key: where dK and dV start
        by_key, d_by_key = row_gradients(
            class_query[None, :], class_grad[None, :], class_top, class_delta, key_0, value_0, log2_scale
        )
        d_class_query = d_score * class_key + tl.sum(d_by_key[:, None] * key_0.to(tl.float32), 0)
        store_row(d_queries, d_class_query * scale, D, BLOCK_D)
        d_key_0 += d_by_key[:, None] * class_query[None, :]
        d_value_0 += by_key[:, None] * class_grad[None, :]

    for tile in range(0, tl.cdiv(tokens - START, QUERIES)):
        first = START + tile * QUERIES
        rows = first + tl.arange(0, QUERIES)
        left = tokens - first
        query = load_tile(queries + first * token_stride, token_stride, left, D, QUERIES, BLOCK_D, CLASS_TOKEN)
        grad = load_tile(d_out + first * width, width, left, D, QUERIES, BLOCK_D, CLASS_TOKEN)
        result = load_tile(out + first * width, width, left, D, QUERIES, BLOCK_D, CLASS_TOKEN)
        top = tl.load(lse + rows, mask=rows < tokens, other=0.0)
        delta = tl.sum(result.to(tl.float32) * grad.to(tl.float32), 1)
        d_query = tl.zeros((BLOCK_D, QUERIES), tl.float32)
        if CLASS_TOKEN:
            tile_key, tile_value = load_row(keys, D, BLOCK_D), load_row(values, D, BLOCK_D)
            _, d_scores = row_gradients(query, grad, top, delta, tile_key[None, :], tile_value[None, :], log2_scale)
            d_query += d_scores[None, :] * tile_key[:, None]
        d_query, d_key_0, d_value_0 = backpropagate(
            query, grad, top, delta, key_0, value_0, rows, START + tl.arange(0, KEYS_0), tokens,
            d_query, d_key_0, d_value_0, log2_scale, CAUSAL, CLASS_TOKEN,
        )  # fmt: skip
        if KEYS_1:
            d_query, d_key_1, d_value_1 = backpropagate(
                query, grad, top, delta, key_1, value_1, rows, START + KEYS_0 + tl.arange(0, KEYS_1), tokens,
                d_query, d_key_1, d_value_1, log2_scale, CAUSAL, CLASS_TOKEN,
            )  # fmt: skip
        d_query = tl.trans(d_query * scale)
        store_tile(d_queries + first * (3 * width), 3 * width, left, d_query, D, QUERIES, BLOCK_D, CLASS_TOKEN)

    row = 3 * width
    d_keys += START * row
    d_values += START * row
    store_tile(d_keys, row, tokens, d_key_0 * scale, D, KEYS_0, BLOCK_D, CLASS_TOKEN)
    store_tile(d_values, row, tokens, d_value_0, D, KEYS_0, BLOCK_D, CLASS_TOKEN)
    if KEYS_1:
        store_tile(d_keys + KEYS_0 * row, row, tokens - KEYS_0, d_key_1 * scale, D, KEYS_1, BLOCK_D, CLASS_TOKEN)
        store_tile(d_values + KEYS_0 * row, row, tokens - KEYS_0, d_value_1, D, KEYS_1, BLOCK_D, CLASS_TOKEN)


def aot_work(name: str, values: Mapping[str, Any]) -> Work:
    """Return the trips of a kernel's loops: over tiles of queries, of which ``splits`` programs each take a share."""
    tiles = -(-(values["tokens"] - values["CLASS_TOKEN"]) // values["QUERIES"])
    return Work((Loop(tiles / values.get("splits", 1)),))
