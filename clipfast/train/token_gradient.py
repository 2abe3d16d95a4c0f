"""The gradient of the token table on the CPU: parts of a batch add to the rows of their tokens, not to all rows.

PyTorch gives an embedding's gradient as new memory of the table's size, 101 MB for CLIP's 49,408 tokens of 512, for
every part of a batch, and adds the parts up. New memory costs page faults, eight times what it takes to set old memory
to zero. Here it stays from step to step, and each part is added to its rows alone. What arrives in ``grad`` is
PyTorch's dense gradient: of one part bit for bit, of several but for the order of a row's sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class TokenGradient:
    """Keeps the memory of an embedding's gradient.

    Args:
        embedding: The embedding. It is as it was whenever :meth:`kept` is not entered.
    """

    def __init__(self, embedding: nn.Module) -> None:
        self._embedding = embedding
        self._memory: Tensor | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Let backward passes inside a ``with`` block add to rows, where that changes nothing else.

        The gradient of an earlier block is overwritten: it has to be out of use.
        """
        if not self._serves():
            yield
            return
        embedding = self._embedding
        embedding.weight.grad = self._zeros(embedding.weight)
        # a sparse gradient is added to a dense one in place
        embedding.sparse = True
        try:
            yield
        finally:
            embedding.sparse = False

    def _serves(self) -> bool:
        embedding = self._embedding
        if type(embedding) is not nn.Embedding or embedding.sparse or embedding.scale_grad_by_freq:
            return False
        weight = embedding.weight
        return (
            type(weight) is nn.Parameter
            and weight.device.type == "cpu"
            # in 16 bits sums round, and PyTorch has an order for them
            and weight.dtype in (torch.float32, torch.float64)
            and weight.requires_grad
            and weight.grad is None
            # these would see the sparse gradient
            and not weight._backward_hooks
        )

    def _zeros(self, weight: Tensor) -> Tensor:
        memory = self._memory
        if memory is None or memory.shape != weight.shape or memory.dtype != weight.dtype:
            self._memory = torch.zeros_like(weight, memory_format=torch.contiguous_format)
            return self._memory
        # a new tensor over the memory, in case somebody kept the other one as it was
        return memory.zero_().detach()
