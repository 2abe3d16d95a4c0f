"""Probes of kernels that work on rows (:mod:`clipfast.ops.trust`): small inputs, copied until they fill a card."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from clipfast.ops.trust import Probe

Tensors = tuple[Tensor, ...]


def random(seed: int, device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return normal numbers, the same on every device, without touching anybody's generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def probe_rows(
    rows: Tensors,
    shared: Tensors,
    d_outputs: Tensors,
    copies: int,
    launch: Callable[[Tensors, Tensors, Tensors], Sequence[Tensor]],
    reference: Callable[..., Tensor | Tensors],
) -> Probe:
    """Return the probe of a kernel.

    Args:
        rows: Its inputs with rows; the kernel gets ``copies`` of them behind each other.
        shared: Its inputs that all rows share, such as weights.
        d_outputs: The gradients of its outputs, with rows; none for a forward kernel.
        copies: How many.
        launch: Runs the kernel on the copies of ``rows``, ``shared`` and the copies of ``d_outputs``. A forward kernel
            returns its outputs, a backward one the gradients of the rows, then those of what is shared.
        reference: The forward pass in plain PyTorch, of rows and what is shared, in any dtype.
    """
    full, d_full = (tuple(t.repeat(copies, *[1] * (t.dim() - 1)) for t in ts) for ts in (rows, d_outputs))

    def expected(exact: bool) -> list[Tensor]:
        # sums over all rows are rounded as often as there are rows: the reference gets all of them too
        whole = bool(shared) and bool(d_outputs) and not exact
        inputs = [*(full if whole else rows), *shared]
        gradients = d_full if whole else d_outputs
        if exact:
            inputs, gradients = [t.double() for t in inputs], tuple(t.double() for t in gradients)
        with torch.set_grad_enabled(bool(d_outputs)):
            inputs = [t.detach().requires_grad_(bool(d_outputs)) for t in inputs]
            outputs = reference(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if not d_outputs:
                return list(outputs)
            found = torch.autograd.grad(outputs, inputs, gradients)
        of_rows, of_shared = found[: len(rows)], found[len(rows) :]
        return [
            *(g[: len(r)] for g, r in zip(of_rows, rows, strict=True)),
            *(g * (copies if exact else 1) for g in of_shared),
        ]

    # every output of a forward kernel has rows
    with_rows = len(rows) if d_outputs else None
    return Probe(lambda: launch(full, shared, d_full), copies, with_rows, expected)
