"""Captions without the tokens behind the one that is read: packed behind each other, or cut to a common length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import attention_packed, transfer

# few, so that a compiled or captured model keeps few variants; captions of pictures have 10 to 30 tokens
CAPTION_BUCKETS = (8, 16, 24, 32, 48, 64, 77)


@dataclass(frozen=True)
class Packing:
    """Packed captions, ordered by their length, and where they go to.

    Attributes:
        tokens: ``[total]``: the ids of the packed tokens.
        positions: ``[total]``: each one's position in its caption.
        cu_seqlens: ``[B + 1]`` int64 in host memory: the packed captions' offsets, not to be written to. What ops want
            to know of them, on a device too, they find without computing or sending it again.
        ends: ``[B]``: each caption's last packed token.
        order: ``[B]``: where each caption of the batch lies among the packed ones.
    """

    tokens: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    ends: Tensor
    order: Tensor


def pack(tokens: Tensor, read: Tensor, device: torch.device | None = None, fill: int = 0) -> Packing:
    """Pack captions up to the token that is read.

    Args:
        tokens: Token ids ``[B, L]``.
        read: ``[B]``: the position of each caption's last token, where ``tokens`` are. On a GPU, this waits for it.
        device: Where the packed tokens are wanted: that of ``tokens``, which is the default, or any for tokens in host
            memory, whose padding is not sent.
        fill: So many captions of one token, which nobody reads, are packed too.

    Returns:
        A :class:`Packing` whose tensors (but ``cu_seqlens``) lie on the device. Captions of one length lie behind each
        other, so that attention takes them as one batch without moving them. Beyond reading lengths off a device,
        nothing waits for it: all that the layers need goes there in one copy, from pinned memory.
    """
    device = tokens.device if device is None else device
    read = read.cpu().long()
    captions = torch.arange(len(read), device="cpu")
    if fill:
        read, captions = (F.pad(t, (0, fill)) for t in (read, captions))
    lengths, by_length = (read + 1).sort(stable=True)
    cu_seqlens = attention_packed.offsets_of(lengths)
    # in host memory, whatever PyTorch's default device is
    total = int(cu_seqlens[-1])
    positions = torch.arange(total, device="cpu") - cu_seqlens[:-1].repeat_interleave(lengths)
    rows = positions + (captions[by_length] * tokens.shape[1]).repeat_interleave(lengths)
    order = attention_packed.inverse(by_length)
    order = order[: len(order) - fill]
    on_host = tokens.device.type == "cpu"
    ids = tokens.flatten()[rows] if on_host else rows
    ends = cu_seqlens[1:] - 1
    if device.type == "cpu":
        attention_packed.remember(cu_seqlens, lengths, total)
        return Packing(ids, positions, cu_seqlens, ends, order)
    offsets, ids, positions, ends, order = transfer.together([cu_seqlens.int(), ids, positions, ends, order], device)
    attention_packed.remember(cu_seqlens, lengths, total, offsets)
    return Packing(ids if on_host else tokens.flatten()[ids], positions, cu_seqlens, ends, order)


def trim_captions(tokens: Tensor, *, eos_id: int = 49407, buckets: Sequence[int] = CAPTION_BUCKETS) -> Tensor:
    """Cut the columns off that lie behind every caption's end: the form of captions for ``torch.compile``.

    It is for text towers like CLIP's, causal and read at the EOS. SigLIP's attends to its padding: do not cut it.

    A compiled model, or one in a CUDA graph, cannot pack: how many tokens there are is data. It computes the columns
    that it is given, so give it few. A model compiled with ``dynamic=False`` is compiled once for every bucket that
    occurs.

    Args:
        tokens: Token ids ``[B, L]`` in host memory (elsewhere this waits for the device), each row with an EOS.
        eos_id: The id of the end-of-text token.
        buckets: The lengths that come out; L is one more.

    Returns:
        ``[B, L']``, a view: the shortest bucket that holds every row's first EOS.

    Raises:
        ValueError: ``tokens`` is not ``[B, L]``, or a row has no EOS.
    """
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"trim_captions(tokens): got shape {tuple(tokens.shape)}, expected [B, L], not empty")
    found = tokens == eos_id
    if not bool(found.any(dim=-1).all()):
        raise ValueError(f"trim_captions(tokens): got a row without the EOS id {eos_id}, expected one in every row")
    longest = int(found.to(torch.uint8).argmax(dim=-1).max()) + 1
    fitting = [length for length in buckets if longest <= length < tokens.shape[1]]
    return tokens[:, : min(fitting, default=tokens.shape[1])]
