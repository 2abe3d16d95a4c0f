"""Memory that shows what a kernel reads and writes beside what it was given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

# elements: more than a kernel's tile is wider than a row, and a multiple of 16 so that addresses stay aligned
GUARD = 1024


def inside_nan(values: Tensor) -> Tensor:
    """Return ``[..., C]`` as a view with NaN before and after every row of it."""
    *lead, rows, width = (1, *values.shape) if values.dim() == 1 else values.shape
    buffer = values.new_full((*lead, rows + 2, width + 2 * GUARD), torch.nan)
    view = buffer[..., 1 : rows + 1, GUARD : GUARD + width]
    view.copy_(values)
    return view[0] if values.dim() == 1 else view


class GuardedMemory:
    """Lets ``new_empty``, which every launcher allocates with, return NaN between guards of NaN."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._buffers: list[tuple[Tensor, int]] = []
        original = Tensor.new_empty

        def new_empty(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
            empty = original(tensor, *size, dtype=dtype, **rest)
            if not empty.is_floating_point():
                return empty
            buffer = original(tensor, empty.numel() + 2 * GUARD, dtype=dtype).fill_(torch.nan)
            self._buffers.append((buffer, empty.numel()))
            return buffer[GUARD : GUARD + empty.numel()].view(empty.shape)

        monkeypatch.setattr(Tensor, "new_empty", new_empty)

    def check(self) -> None:
        """Check that something was allocated, and that no guard was written to."""
        assert self._buffers, "nothing was allocated"
        for buffer, size in self._buffers:
            assert buffer[:GUARD].isnan().all(), "written before a buffer"
            assert buffer[GUARD + size :].isnan().all(), "written behind a buffer"


def far_rows(values: Tensor) -> Tensor:
    """Return ``[3, C]`` as a view whose last row lies more than 2³¹ elements behind the first.

    The memory between the rows is never touched and so never taken.
    """
    rows, width = values.shape
    stride = 2**30 + 16
    buffer = torch.empty((rows - 1) * stride + width, dtype=values.dtype, device=values.device)
    view = buffer.as_strided((rows, width), (stride, 1))
    view.copy_(values)
    assert view.stride(0) < 2**31 < (rows - 1) * view.stride(0)
    return view
