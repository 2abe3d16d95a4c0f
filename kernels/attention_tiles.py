"""What the attention kernels are made of: rows read and written in place, and one step of the softmax.

Weights are powers of 2, ``exp2(log2_scale · QKᵀ - top)`` with ``log2_scale = scale · log2(e)``, because the hardware's
exponential is exp2. Products stay as they come from the tensor cores: the factor and the difference are one FFMA, and
only the largest of a row is multiplied on its own. That finds the largest scaled score if the factor is positive, so
the forward kernels take ``|log2_scale|`` and multiply the products by the scale's ``SIGN`` where it is not 1. All sums
are in fp32. ``input_precision="ieee"`` keeps fp32 inputs out of TF32.

Addresses are a 64-bit scalar (sequence, head, first row of a tile) plus a 32-bit offset within the tile: right past
2³¹ elements, and without a pair of registers an element for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The arguments that Triton shall not specialise for: it would compile anew for a 1 and for a multiple of 16, and a
# batch of another size would meet a kernel that nothing has checked. What code gains from a value, it is told: strides
# come in units of 8 elements, so that every row starts on 16 bytes, and only where they cannot, in units of 1.
NUMBERS = (
    "cu_seqlens",
    "batch_stride",
    "token_stride",
    "part_stride",
    "head_stride",
    "heads",
    "tokens",
    "all_tokens",
    "splits",
)
# below every score: a maximum that starts here, and not at -inf, makes no inf - inf
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def widen(index):
    """Return a loop's index in 64 bits (Triton's interpreter hands it out as a plain number, without ``.to``)."""
    return tl.full((), 0, tl.int64) + index


@triton.jit
def heads_of(qkv, offset, head, token_stride, part_stride, head_stride, UNIT: tl.constexpr):
    """Return where a head's queries, keys and values start, and the stride of their tokens in elements.

    Strides come in units of ``UNIT`` elements (:data:`NUMBERS`); ``offset``, in units too, leads to the sequence.
    """
    queries = qkv + (offset + head * head_stride) * UNIT
    keys = queries + widen(part_stride) * UNIT
    return queries, keys, keys + widen(part_stride) * UNIT, token_stride * UNIT


@triton.jit
def tile_offsets(row_stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the offsets ``[ROWS, BLOCK_D]`` of a tile's elements from its first."""
    return tl.arange(0, ROWS)[:, None] * row_stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_mask(rows_left, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return which elements of a tile exist, ``[ROWS, BLOCK_D]``."""
    return (tl.arange(0, ROWS)[:, None] < rows_left) & (tl.arange(0, BLOCK_D)[None, :] < D)


@triton.jit
def load_tile(
    first, row_stride, rows_left, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr
):
    """Return ``[ROWS, BLOCK_D]`` from the address of its first element, zero where there is none."""
    addresses = first + tile_offsets(row_stride, ROWS, BLOCK_D)
    if FULL and D == BLOCK_D:
        tile = tl.load(addresses)
    else:
        tile = tl.load(addresses, mask=tile_mask(rows_left, D, ROWS, BLOCK_D), other=0.0)
    return tile


@triton.jit
def store_tile(
    first, row_stride, rows_left, tile, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr
):
    """Write ``[ROWS, BLOCK_D]`` in the dtype of its place."""
    addresses = first + tile_offsets(row_stride, ROWS, BLOCK_D)
    tile = tile.to(first.dtype.element_ty)
    if FULL and D == BLOCK_D:
        tl.store(addresses, tile)
    else:
        tl.store(addresses, tile, mask=tile_mask(rows_left, D, ROWS, BLOCK_D))


@triton.jit
def load_row(first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return one row ``[BLOCK_D]`` in fp32."""
    columns = tl.arange(0, BLOCK_D)
    return tl.load(first + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_row(first, row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write one row ``[BLOCK_D]`` in the dtype of its place."""
    columns = tl.arange(0, BLOCK_D)
    tl.store(first + columns, row.to(first.dtype.element_ty), mask=columns < D)


@triton.jit
def store_statistics(lse, second, rows, tokens, top, total, EXACT: tl.constexpr):
    """Write what the backward pass needs of a tile's softmax: ``top + log2(total)``, rounded once at that size.

    For fp32 (``EXACT``) that rounding is as large as all others together: ``top`` and, ``second`` elements behind it,
    ``1 / total`` say the same without it.
    """
    if EXACT:
        tl.store(lse + rows, top, mask=rows < tokens)
        tl.store(lse + second + rows, 1.0 / total, mask=rows < tokens)
    else:
        tl.store(lse + rows, top + tl.log2(total), mask=rows < tokens)


@triton.jit
def load_statistics(lse, second, rows, tokens, d_out, EXACT: tl.constexpr):
    """Return a tile's ``lse`` and its ``d_out``; for fp32 the largest score and ``d_out / total`` in their place.

    All gradients are linear in weights times ``d_out``, so it does not matter which of the two is divided.
    """
    top = tl.load(lse + rows, mask=rows < tokens, other=0.0)
    if EXACT:
        d_out = d_out * tl.load(lse + second + rows, mask=rows < tokens, other=0.0)[:, None]
    return top, d_out


@triton.jit
def load_class_statistics(lse, second, d_out, EXACT: tl.constexpr):
    """Return :func:`load_statistics` of the first token alone, ``d_out`` as ``[BLOCK_D]``."""
    top = tl.load(lse)
    if EXACT:
        d_out = d_out * tl.load(lse + second)
    return top, d_out


@triton.jit
def signed(products, SIGN: tl.constexpr):
    """Return products of queries and keys with the sign of the scale: -1, 0 or 1."""
    if SIGN != 1:
        products = products * SIGN
    return products


@triton.jit
def begin(
    query, keys, values, log2_scale, QUERIES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, SIGN: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
):  # fmt: skip
    """Return ``top, total, acc`` (see :func:`absorb`) of a tile of queries that has seen the class token, or nothing.

    A class token's key and value are read again by every tile: cheaper than the registers to keep them in.
    """
    if CLASS_TOKEN:
        class_key, class_value = load_row(keys, D, BLOCK_D), load_row(values, D, BLOCK_D)
        top = signed(tl.sum(query.to(tl.float32) * class_key[None, :], 1), SIGN) * log2_scale
        total = tl.full((QUERIES,), 1.0, tl.float32)
        acc = tl.zeros((QUERIES, BLOCK_D), tl.float32) + class_value[None, :]
    else:
        top = tl.full((QUERIES,), LOWEST, tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        acc = tl.zeros((QUERIES, BLOCK_D), tl.float32)
    return top, total, acc


@triton.jit
def absorb(query, key, value, rows, columns, tokens, top, total, acc, log2_scale, SIGN: tl.constexpr,
           CAUSAL: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Let a tile of queries see a tile of keys: one step of the online softmax (Milakov and Gimelshein, 2018).

    Args:
        query: ``[M, BLOCK_D]``; key and value: ``[N, BLOCK_D]``.
        rows, columns: ``[M]`` and ``[N]``, the tokens that they are.
        tokens: The length of the sequence.
        top, total, acc: ``[M]``, ``[M]``, ``[M, BLOCK_D]``: the largest scaled score so far, and the sums of weights
            and of weighted values relative to it.
        log2_scale: Above zero.
    """
    scores = signed(tl.dot(query, tl.trans(key), input_precision="ieee"), SIGN)
    if CAUSAL:
        scores = tl.where((columns[None, :] < tokens) & (columns[None, :] <= rows[:, None]), scores, float("-inf"))
    elif not FULL:
        scores = tl.where(columns[None, :] < tokens, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * log2_scale)
    shrink = tl.exp2(top - new_top)
    # one FFMA, which the compiler makes of it
    weights = tl.exp2(scores * log2_scale - new_top[:, None])
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def absorb_row(query, key, value, top, total, acc, log2_scale, SIGN: tl.constexpr):
    """Let the class token's query ``[BLOCK_D]`` see a full tile of keys: :func:`absorb` for one row, without a product
    of matrices, of which it would fill a 64th."""
    scores = signed(tl.sum(key.to(tl.float32) * query[None, :], 1), SIGN) * log2_scale
    new_top = tl.maximum(top, tl.max(scores, 0))
    shrink = tl.exp2(top - new_top)
    weights = tl.exp2(scores - new_top)
    total = total * shrink + tl.sum(weights, 0)
    acc = acc * shrink + tl.sum(weights[:, None] * value.to(tl.float32), 0)
    return new_top, total, acc


@triton.jit
def score_gradients(query, d_out, lse, delta, key, value, rows, columns, tokens, log2_scale,
                    CAUSAL: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Return the weights and the gradients of the scores of a tile, both ``[keys, queries]``.

    They are formed key by key (transposed), so that the products that sum over queries take them from registers.
    Masked keys need the mask here too: a key of zeros has the weight ``2^-lse``, which may overflow.
    """
    products = tl.dot(key, tl.trans(query), input_precision="ieee")
    weights = tl.exp2(products * log2_scale - lse[None, :])
    if CAUSAL:
        weights = tl.where((columns[:, None] < tokens) & (columns[:, None] <= rows[None, :]), weights, 0.0)
    elif not FULL:
        weights = tl.where(columns[:, None] < tokens, weights, 0.0)
    d_weights = tl.dot(value, tl.trans(d_out), input_precision="ieee")
    return weights, weights * (d_weights - delta[None, :])


@triton.jit
def score_gradients_by_query(query, d_out, lse, delta, key, value, rows, columns, tokens, log2_scale,
                             CAUSAL: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Return the gradients of the scores of a tile as ``[queries, keys]``, for a sum over keys."""
    products = tl.dot(query, tl.trans(key), input_precision="ieee")
    weights = tl.exp2(products * log2_scale - lse[:, None])
    if CAUSAL:
        weights = tl.where((columns[None, :] < tokens) & (columns[None, :] <= rows[:, None]), weights, 0.0)
    elif not FULL:
        weights = tl.where(columns[None, :] < tokens, weights, 0.0)
    return weights * (tl.dot(d_out, tl.trans(value), input_precision="ieee") - delta[:, None])


@triton.jit
def row_gradients(query, d_out, lse, delta, key, value, log2_scale):
    """Return :func:`score_gradients` of one row of queries or of keys against a full tile of the others, both ``[N]``.

    The product is symmetric: give the class token's ``query, d_out`` (``[BLOCK_D]``, with its ``lse, delta``) and tiles
    ``key, value``, or its ``key, value`` as the rows and tiles ``query, d_out`` with theirs.
    """
    weights = tl.exp2(tl.sum(key.to(tl.float32) * query.to(tl.float32), 1) * log2_scale - lse)
    d_weights = tl.sum(value.to(tl.float32) * d_out.to(tl.float32), 1)
    return weights, weights * (d_weights - delta)


@triton.jit
def backpropagate(query, d_out, lse, delta, key, value, rows, columns, tokens, d_query, d_key, d_value, log2_scale,
                  CAUSAL: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    """Add what a tile of queries and a tile of keys give to each other's gradients (dQ, dK without ``scale``)."""
    weights, d_scores = score_gradients(
        query, d_out, lse, delta, key, value, rows, columns, tokens, log2_scale, CAUSAL, FULL
    )
    d_value = tl.dot(weights.to(d_out.dtype), d_out, d_value, input_precision="ieee")
    d_scores = d_scores.to(query.dtype)
    d_key = tl.dot(d_scores, query, d_key, input_precision="ieee")
    d_query = tl.dot(tl.trans(key), d_scores, d_query, input_precision="ieee")
    return d_query, d_key, d_value
