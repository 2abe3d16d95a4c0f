"""Products of few float32 rows on the CPU, whose gradients would have fewer digits than those of many."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops.dispatch import leaves_clipfast

# from here on all are alike
_ENOUGH = 12
_MULTIPLE = 4


def missing(rows: int, like: Tensor) -> int:
    """Return how many rows should be added for products as exact as those of many.

    With gradients, in float32 on the CPU: MKL takes 4 rows at a time there, and up to 12 rows what is left over (by
    itself below 4, and on one of two threads up to 11) term by term. That rounds four times as much over 3,072 terms.

    Args:
        rows: How many there are.
        like: In their dtype and on their device.
    """
    # what is exported for every batch may not ask how many there are
    if like.device.type != "cpu" or like.dtype != torch.float32 or not torch.is_grad_enabled() or leaves_clipfast():
        return 0
    return -rows % _MULTIPLE if rows < _ENOUGH else 0


def filled_up(x: Tensor, rows: int) -> Tensor:
    """Return ``x [S, W]`` with zeros behind it, ``[rows, W]``: the other rows and all gradients are what they were."""
    return x if x.shape[0] >= rows else F.pad(x, (0, 0, 0, rows - x.shape[0]))
