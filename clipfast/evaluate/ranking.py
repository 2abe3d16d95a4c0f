"""Where the right candidate stands among all, with an order for those that score the same.

Of equal scores the candidate of the lower index goes first, as in ``argmax`` and in a stable sort; ``topk``, which the
rivals rank with, leaves the order open. The place of a candidate so depends on scores and indices alone, and not on
batches, chunks, threads or the device. Scores are cosines. Two are equal where they are closer than eight roundings:
the same product, computed at two places of a matrix, may differ in its last bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Scores held at a time: 64 MiB of float32, whatever the number of queries.
SCORES_IN_MEMORY = 1 << 24


def ranks_of_right(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """Return the rank of each query's best right candidate, from 1.

    Args:
        queries: ``[Q, D]``, of unit length, float32 or float64.
        candidates: ``[N, D]``, likewise.
        query_ids: int64 ``[Q]``.
        candidate_ids: int64 ``[N]``; those of a query's id are right, and there is at least one.

    Returns:
        int64 ``[Q]``.
    """
    tie = 8 * torch.finfo(queries.dtype).eps
    places = torch.arange(len(candidates), device=candidates.device)
    ranks = []
    chunk = max(1, SCORES_IN_MEMORY // len(candidates))
    for rows, ids in zip(queries.split(chunk), query_ids.split(chunk), strict=True):
        scores = rows @ candidates.T
        right = ids[:, None] == candidate_ids
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
        equal = (scores - best).abs() <= tie
        first = (equal & right).int().argmax(dim=1, keepdim=True)
        before = (scores > best + tie) | (equal & (places < first))
        ranks.append(1 + before.sum(dim=1))
    return torch.cat(ranks)
