"""CUDA graphs on the CPU: what a function computes is recorded, operator by operator, and computed again in place.

As on a card, a replay runs none of the Python code, writes where the recording wrote, and reads the memory that the
recording read, whatever lies there now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = any(getattr(t, "dtype", None) == torch.bool for t in pytree.tree_leaves(args[1:2]))
        if READS & set(op.tags) and (op is not torch.ops.aten.index.Tensor or masked):
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing: {op}")
        kwargs = kwargs or {}
        out = op(*args, **kwargs)
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        # as a card does, forget which tensors these were: their memory counts
        frozen = pytree.tree_map(lambda t: _alias(t) if isinstance(t, Tensor) else t, (args, kwargs))
        self.steps.append((op, *frozen, [_alias(t) for t in results]))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for op, args, kwargs, results in self.steps:
                again = [t for t in pytree.tree_leaves(op(*args, **kwargs)) if isinstance(t, Tensor)]
                for old, new in zip(results, again, strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _alias(x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.empty(0, dtype=x.dtype).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


class Graphs:
    """Stands in the place of :mod:`clipfast.models.graphed`'s functions for a card; counts captures and replays."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.error: Exception | None = None

    def capture(self, run: Callable[[], Tensor], device: torch.device, pool: Any) -> tuple[Tensor, Callable[[], None]]:
        """Record."""
        if self.error is not None:
            raise self.error
        self.captures += 1
        recorder = _Recorder()
        with recorder:
            out = run()

        def replay() -> None:
            self.replays += 1
            recorder.replay()

        return out, replay
