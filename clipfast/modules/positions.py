"""Learned position embeddings of one grid of patches, resampled to the grids of pictures of any aspect."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.modules import inference

# rows of resampled positions that are kept: 100 MB of a base tower's in float32, 128 grids of 256 patches
MOST_ROWS = 32_768

Grid = tuple[int, int]


def resampled_positions(table: Tensor, grids: Sequence[Grid]) -> list[Tensor]:
    """Resample position embeddings to other grids, as SigLIP 2 does: bilinear, with antialiasing.

    Args:
        table: ``[h, w, W]``, floating point.
        grids: ``(rows, columns)``, each best named once.

    Returns:
        For each grid ``[rows · columns, W]`` in the dtype of ``table``, row by row. On the CPU they are computed in
        float32, those of float64 too, as in transformers; elsewhere in float32, or float64 where that is the table's.
        Gradients of the grids are added up in the dtype that was computed in, the last grid's first.
    """
    on_cpu = table.device.type == "cpu"
    own = table.permute(2, 0, 1).unsqueeze(0)
    own = own.to(torch.float32 if on_cpu else torch.promote_types(table.dtype, torch.float32))

    def resampled(grid: Grid) -> Tensor:
        # to its own grid, every weight is 1 or 0: nothing to compute, and nothing that an exported model lacks
        if grid == tuple(table.shape[:2]):
            return own
        return F.interpolate(own, size=grid, mode="bilinear", align_corners=False, antialias=True)

    return [resampled(grid)[0].flatten(1).T.to(table.dtype) for grid in grids]


class KeptPositions:
    """Resampled positions of one table, no more than :data:`MOST_ROWS` rows of them: the last that were asked for.

    Args:
        table: ``[h, w, W]``, which stays as it is.
    """

    def __init__(self, table: Tensor) -> None:
        self._table = table.detach()
        self._found: dict[Grid, Tensor] = {}
        self._lock = threading.Lock()

    def of(self, grids: Sequence[Grid]) -> list[Tensor]:
        """Return ``[rows · columns, W]`` for each grid, without gradients and not to be written to."""
        with self._lock:
            missing = [grid for grid in dict.fromkeys(grids) if grid not in self._found]
            # what is kept may serve outside of inference mode
            with torch.inference_mode(False), torch.no_grad():
                new = [rows.contiguous() for rows in resampled_positions(self._table, missing)]
            self._found |= dict(zip(missing, new, strict=True))
            result = [self._found[grid] for grid in grids]
            for grid in dict.fromkeys(grids):  # the last that were asked for come last
                self._found[grid] = self._found.pop(grid)
            total = sum(len(rows) for rows in self._found.values())
            while total > MOST_ROWS:
                total -= len(self._found.pop(next(iter(self._found))))
        return result


def positions_for(owner: nn.Module, table: Tensor, grid: Grid, grids: Sequence[Grid], x: Tensor) -> list[Tensor]:
    """Return :func:`resampled_positions`, kept from call to call where the table is what it was and ``x`` is inferred.

    Args:
        owner: What they are kept for (:func:`clipfast.modules.inference.kept`).
        table: The parameter ``[h · w, W]``.
        grid: Its ``(h, w)``.
        grids: What is wanted, each grid once.
        x: What the positions are for.
    """

    def view() -> Tensor:
        return table.unflatten(0, grid)

    kept = inference.kept(owner, (table,), x, lambda _: KeptPositions(view()), what="positions")
    return resampled_positions(view(), grids) if kept is None else kept.of(grids)
