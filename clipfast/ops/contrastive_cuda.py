"""The op library's CUDA kernels of the losses: checked before they serve; where they fail, PyTorch's tiles do.

They are operators of their own, so that a compiled model, which calls operators and not this file, falls back too.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import contrastive_kernels, fallback, library, trust
from clipfast.ops.contrastive_kernels import Kernels, accumulation_dtype
from clipfast.ops.probes import random

_OPS = {"statistics": "contrastive_loss", "gradients": "contrastive_loss"}
_OPS |= {f"siglip_{name}": "siglip_loss" for name in _OPS}


def refusal(op: str, image: Tensor, dtype: torch.dtype | None = None) -> str | None:
    """Return why the op library's CUDA kernels cannot serve a loss of features on a card, or None.

    Args:
        op: The loss.
        image: Its features.
        dtype: That of the kernels' features, where it is another.
    """
    reason = library.missing_cuda_entry_points() or library.card_refusal(image.device.index)
    if reason is not None or not trust.is_possible():
        return reason
    if trust.is_required(image.device):
        reason = trust.refusal(op, image.device, [trial(op, image, dtype)])
    return reason or fallback.failure(op, image.device)


def _define(field: str) -> Any:
    """Define the operator that runs one of the kernels; its schema is that of PyTorch's tiles."""
    chunked = getattr(contrastive_kernels.chunked, field)
    op, name = _OPS[field], chunked.default._schema.name.partition("::")[2].replace("_chunked", "_on_card")

    def run(image: Tensor, *rest: Any) -> Any:
        kernel = getattr(contrastive_kernels.native, field)
        return trust.serve(op, image.device, lambda image, *_: [trial(op, image)], kernel, chunked, image, *rest)

    schema = str(chunked.default._schema)
    _definitions.define(name + schema[schema.index("(") :])
    _definitions.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clipfast::{name}", contrastive_kernels.fakes[field], lib=_definitions)
    return getattr(torch.ops.clipfast, name)


_definitions = torch.library.Library("clipfast", "FRAGMENT")

#: The kernels as the losses call them for features on a card.
kernels = Kernels(*(_define(field) for field in Kernels._fields))


def trial(op: str, image: Tensor, dtype: torch.dtype | None = None) -> trust.Trial:
    """Return how the kernels that a loss gets are checked."""
    return _trial_of(op, image.device, dtype or image.dtype, image.shape[1])


@functools.cache
def _trial_of(op: str, device: torch.device, dtype: torch.dtype, width: int) -> trust.Trial:
    name = f"{op} by the op library, width {width}, {str(dtype).removeprefix('torch.')}"
    return trust.Trial(name, (op, dtype, width), lambda programs: _probe(op, device, dtype, width, programs))


def _probe(op: str, device: torch.device, dtype: torch.dtype, width: int, programs: int) -> trust.Probe:
    """Return the probe of a loss: statistics and gradients of one batch, 3 rows more than tiles hold."""
    # tiles of 128 × 128, of which a card holds fewer than the programs of a probe
    batch = 128 * max(1, round(programs**0.5)) + 3 if programs > 16 else 131
    image, text = (F.normalize(random(i, device, torch.float64, batch, width), dim=1).to(dtype) for i in (1, 2))
    sums = accumulation_dtype(dtype)
    scale, bias = (torch.tensor(x, device=device, dtype=sums) for x in (20.0, -10.0))
    weight = torch.full((batch,), 1 / batch, device=device, dtype=sums)

    def compute(kernels: Kernels, exact: bool = False) -> Sequence[Tensor]:
        wider = torch.float64 if exact else None
        i, t, s, b, w = (x.to(wider) if exact else x for x in (image, text, scale, bias, weight))
        if op == "siglip_loss":
            losses = kernels.siglip_statistics(i, t, s, b, None, None, 0)
            again, *gradients = kernels.siglip_gradients(i, t, s, b, None, None, w, 0)
            return [losses.mean(), again.mean(), *gradients]
        row_lse, column_lse, positive, *_ = kernels.statistics(i, t, s, None, None, 0)
        half = w / 2
        gradients = kernels.gradients(i, t, s, None, None, row_lse, column_lse, half, half, 0)
        losses = sum((lse[0] - positive + lse[1]) / 2 for lse in (row_lse, column_lse))
        return [losses.mean(), *gradients]

    def launch() -> Sequence[Tensor]:
        return compute(contrastive_kernels.native)

    def expected(exact: bool) -> Sequence[Tensor]:
        return compute(contrastive_kernels.chunked, exact)

    # a loss of SigLIP's is a sum over all texts
    many = batch if op == "siglip_loss" else 1
    scales = (20.0 * many / batch, 20.0 * many / batch, many)
    scales = (many, many, *scales, many) if op == "siglip_loss" else (many, *scales)
    return trust.Probe(launch, 1, 0, expected, tuple(float(s) for s in scales))
