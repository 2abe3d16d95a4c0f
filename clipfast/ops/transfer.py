"""From host memory to a card without waiting for it: pinned, non-blocking, and in one copy where it is several tensors.

A copy from ordinary (pageable) memory waits until the card has taken it, and so until all that was launched before it
is done. One from pinned memory only takes its place in the stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# where each tensor of several starts: what Triton takes for aligned, and more than any dtype here needs
_ALIGNMENT = 16

_library = torch.library.Library("clipfast", "FRAGMENT")
_library.define("to_device(Tensor host, Device device) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of host memory on ``device``, on its way there while the host goes on.

    ``host`` may be written to at once: the copy leaves from memory of its own. Where memory cannot be pinned, and for
    devices that need no copy, this is ``host.to(device)``. So it is while a CUDA graph is captured, where that is an
    error: a replay would read pinned memory that holds something else by then.
    """
    if host.device.type != "cpu" or device.type in ("cpu", "meta"):
        return host.to(device)
    if torch.compiler.is_compiling():
        # what is traced cannot pin
        return torch.ops.clipfast.to_device(host, device)
    return _send(host, device)


def together(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of host memory on ``device``, sent in one copy: there they are views of one buffer."""
    if device.type == "cpu":
        return list(parts)
    ends = torch.tensor([-(-part.nbytes // _ALIGNMENT) * _ALIGNMENT for part in parts], device="cpu").cumsum(0).tolist()
    buffer = torch.empty(ends[-1], dtype=torch.uint8, device="cpu")
    starts = [0, *ends[:-1]]
    for start, part in zip(starts, parts, strict=True):
        buffer[start : start + part.nbytes].view(part.dtype).copy_(part.flatten())
    buffer = to_device(buffer, device)
    return [
        buffer[start : start + part.nbytes].view(part.dtype).view(part.shape)
        for start, part in zip(starts, parts, strict=True)
    ]


def is_capturing(device: torch.device) -> bool:
    """Return whether what is launched on ``device`` now becomes part of a CUDA graph."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def _send(host: Tensor, device: torch.device) -> Tensor:
    if is_capturing(device):
        return host.to(device)
    try:
        pinned = host.pin_memory()
        # pinned already: the caller's own memory
        pinned = host.clone().pin_memory() if pinned is host else pinned
    except RuntimeError:  # no accelerator that could read it
        return host.to(device)
    return pinned.to(device, non_blocking=True)


def _operator(host: Tensor, device: torch.device) -> Tensor:
    # an operator's result is memory of its own
    there = _send(host.contiguous(), device)
    return there.clone() if there.device == host.device else there


def _fake(host: Tensor, device: torch.device) -> Tensor:
    return host.new_empty(host.shape, device=device)


_library.impl("to_device", _operator, "CPU")
torch.library.register_fake("clipfast::to_device", _fake, lib=_library)
