"""Noticing writes to weights that nobody counts: what of them is looked at again before what was made of them serves.

PyTorch counts writes to a tensor, but neither those through ``.data``, NumPy or DLPack nor those of other libraries.
Reading all weights again would take longer than a forward pass. A turn reads some of them, each turn others:

- With the op library (``csrc/cpu/fingerprint.cpp``): 64 bytes of every row of a matrix, or of one row drawn out of two
  (768 rows and more) or four (2,048 and more), at places that form a lattice, and all of every vector. It is compared
  by hashes of 64 bits.
- Without: 512 to 1,000 elements of every matrix, at places that form a lattice, all of every vector, and one piece of
  65,536 elements of everything.

Either finds, at the next turn, whatever was written to a vector, or to 1/64 of a matrix or more in rows side by side,
in columns side by side, or in a block. With the op library it finds any whole column, and 1/64 of the rows wherever
they are, but for a probability below 3e-4 (none of some scattered rows was drawn) that ends after four turns. Any write
at all is found within :attr:`Fingerprint.turns` turns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipfast.ops import library

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_GOLDEN = 0.6180339887498949
# without the op library: elements of a matrix that every turn reads, and of the piece that it reads beside them
_POINTS = 512
_SMALL = 4096
_PIECE = 65536


class Fingerprint:
    """What weights are now, to be asked later whether they still are.

    Args:
        weights: Tensors in host memory, each without gaps and not empty. A matrix turned in memory is seen as turned.

    Raises:
        ValueError: A weight has gaps, or is empty.

    Attributes:
        turns: After so many calls of :meth:`changed` everything has been looked at.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        rows = [_rows(weight) for weight in weights]
        for weight, found in zip(weights, rows, strict=True):
            if found is None:
                raise ValueError(
                    f"Fingerprint(weights): got {tuple(weight.shape)} with strides {weight.stride()}, expected one "
                    f"without gaps and not empty"
                )
        native = library.unavailable() is None
        self._state = _Native(rows) if native and rows else _Sampled(rows)
        self.turns = self._state.turns
        # a counter that threads share
        self._turn = itertools.count()

    def changed(self) -> bool:
        """Return whether a turn shows that a weight was written to."""
        return self._state.changed(next(self._turn))


def can_be_read(weight: Tensor) -> bool:
    """Return whether :class:`Fingerprint` takes a weight."""
    return _rows(weight) is not None


def _rows(weight: Tensor) -> Tensor | None:
    """Return a weight's bits as ``[rows, columns]`` in the order of memory, a view; None if there are gaps in it."""
    bits = weight.detach().view(_BITS[weight.element_size()])
    bits = bits.permute(sorted(range(bits.dim()), key=bits.stride, reverse=True))
    if not bits.is_contiguous() or bits.numel() == 0:
        return None
    return bits.view(1 if bits.dim() < 2 else bits.shape[0], -1)


class _Native:
    """Turns and hashes by the op library."""

    def __init__(self, rows: list[Tensor]) -> None:
        self._rows = rows
        self._hashes = torch.ops.clipfast.fingerprint(rows)
        self.turns = 256

    def changed(self, turn: int) -> bool:
        return torch.ops.clipfast.changed_weight(self._rows, self._hashes, turn) >= 0


class _Sampled:
    """The same elements every turn, and a piece of everything that moves on."""

    def __init__(self, rows: list[Tensor]) -> None:
        self._samples = [_lattice(matrix) for matrix in rows]
        self._values = self._seen()
        self._pieces = [piece for matrix in rows for piece in matrix.view(-1).split(_PIECE)]
        generator = torch.Generator().manual_seed(0)
        # odd: the hash changes with any single element
        self._keys = torch.randint(-(2**62), 2**62, (_PIECE,), generator=generator) * 2 + 1
        self._hashes = [self._hash(piece) for piece in self._pieces]
        self.turns = max(1, len(self._pieces))

    def changed(self, turn: int) -> bool:
        if not torch.equal(self._seen(), self._values):
            return True
        i = turn % self.turns
        return bool(self._pieces) and self._hash(self._pieces[i]) != self._hashes[i]

    def _seen(self) -> Tensor:
        return torch.cat(self._samples) if self._samples else torch.empty(0)

    def _hash(self, piece: Tensor) -> int:
        return int((piece.long() * self._keys[: piece.shape[0]]).sum())


def _lattice(matrix: Tensor) -> Tensor:
    """Return a view of elements of every block of 1/64 of a matrix: one of so many in the order of memory.

    From one row to the next the places move on by the golden section of a row, or a row has some and a golden section.
    """
    rows, columns = matrix.shape
    if rows == 1 or matrix.numel() <= _SMALL:
        return matrix.view(-1)
    section = rows // _POINTS - 1 + _GOLDEN if rows >= _POINTS else 1 / (_POINTS // rows + _GOLDEN)
    wanted = round(section * columns)
    # with a common divisor the places would come back to the same columns
    step = next(i for i in itertools.count(max(1, wanted)) if math.gcd(i, columns) == 1)
    return matrix.view(-1)[::step]
