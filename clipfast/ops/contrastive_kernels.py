"""The tile kernels of the contrastive losses: the op library's, and the same in PyTorch with the same memory.

Both sets take and return what the schemas in ``csrc/library.cpp`` say: statistics of logits that are never held as a
whole, and the gradients of both sides from those statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.ops import contrastive_products, library

# A tile of PyTorch's has ROWS × COLUMNS float32 logits: 4 MB, and a few of that size at once. A card would be
# done in 57 µs (170 bytes a logit at 3 TB/s) with what takes 45 launches; 64 MB keep it busy.
ROWS, COLUMNS = 1024, 1024
ON_CARD = 4096


class Kernels(NamedTuple):
    """One set of kernels; all four have the signatures of ``csrc/library.cpp``."""

    statistics: Callable[..., tuple[Tensor, ...]]
    gradients: Callable[..., tuple[Tensor, ...]]
    siglip_statistics: Callable[..., Tensor]
    siglip_gradients: Callable[..., tuple[Tensor, ...]]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits and sums: float64 for float64 features, float32 for all others."""
    return torch.promote_types(dtype, torch.float32)


def join_lse(a: Tensor, b: Tensor) -> Tensor:
    """Join the log-sum-exps ``[2, N]`` of disjoint terms, each the largest and the logarithm of the sum beside it."""
    most = torch.maximum(a[0], b[0])
    # where nothing was seen yet, the largest is -inf
    terms = ((x[0] - most).nan_to_num_(nan=-torch.inf).add_(x[1]) for x in (a, b))
    return torch.stack([most, torch.logaddexp(*terms)])


class _Tile(NamedTuple):
    """``x = product · factors · s`` of rows ``i`` and columns ``j``; ``label`` views the labels' entries of a tile."""

    i: slice
    j: slice
    image: Tensor
    text: Tensor
    product: Tensor
    offset: int

    def label(self, x: Tensor) -> Tensor:
        return x.diagonal(self.offset)

    def labelled_rows(self) -> slice:
        """The rows whose label is in this tile, within the whole matrix."""
        first = self.i.start + max(0, -self.offset)
        return slice(first, first + self.product.diagonal(self.offset).shape[0])


def _tiles(
    image: Tensor, text: Tensor, image_factor: Tensor | None, text_factor: Tensor | None, first_label: int
) -> Iterator[_Tile]:
    """Walk over the tiles; the products have the factors in them, and so have features that are not in 16 bits."""
    dtype = accumulation_dtype(image.dtype)
    mixed = contrastive_products.takes(image)
    height, width = (ON_CARD, ON_CARD) if image.is_cuda else (ROWS, COLUMNS)
    with torch.autocast(image.device.type, enabled=False):
        for row in range(0, image.shape[0], height):
            i = slice(row, min(row + height, image.shape[0]))
            rows = image[i] if mixed else _scaled(image[i].to(dtype), image_factor, i)
            for column in range(0, text.shape[0], width):
                j = slice(column, min(column + width, text.shape[0]))
                columns = text[j] if mixed else _scaled(text[j].to(dtype), text_factor, j)
                product = contrastive_products.multiply(rows, columns.T) if mixed else rows @ columns.T
                if mixed:
                    _scale(product, image_factor, text_factor, i, j)
                offset = row + first_label - column
                # far off the tile there is no such diagonal: an empty one stands for it
                offset = min(max(offset, -rows.shape[0]), columns.shape[0])
                yield _Tile(i, j, rows, columns, product, offset)


def _scale(x: Tensor, image_factor: Tensor | None, text_factor: Tensor | None, i: slice, j: slice) -> None:
    """Multiply a tile by its rows' and columns' factors: 16-bit features that had them in would be rounded again."""
    if image_factor is not None:
        x *= image_factor[i, None]
    if text_factor is not None:
        x *= text_factor[j]


def products(image: Tensor, text: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the rows and columns of each tile of ``image @ text.T``, and its entries in the precision of sums."""
    for tile in _tiles(image, text, None, None, 0):
        yield tile.i, tile.j, tile.product


def _scaled(features: Tensor, factor: Tensor | None, part: slice) -> Tensor:
    return features if factor is None else features * factor[part, None]


def _statistics(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    image_factor: Tensor | None,
    text_factor: Tensor | None,
    first_label: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    new = image.new_empty(0, dtype=accumulation_dtype(image.dtype))
    row_lse, col_lse = (new.new_full((2, len(t)), -torch.inf) for t in (image, text))
    row_rival, col_rival = (new.new_full(t.shape[:1], -torch.inf) for t in (image, text))
    positive = new.new_zeros(image.shape[:1])
    for tile in _tiles(image, text, image_factor, text_factor, first_label):
        x, i, j = tile.product.mul_(logit_scale), tile.i, tile.j
        for lse, dim in ((row_lse[:, i], 1), (col_lse[:, j], 0)):
            most = x.amax(dim)
            lse.copy_(join_lse(lse, torch.stack([most, (x - most.unsqueeze(dim)).exp_().sum(dim).log()])))
        positive[tile.labelled_rows()] = tile.label(x)
        tile.label(x).fill_(-torch.inf)
        row_rival[i] = torch.maximum(row_rival[i], x.amax(1))
        col_rival[j] = torch.maximum(col_rival[j], x.amax(0))
    return row_lse, col_lse, positive, row_rival, col_rival


def _gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    image_factor: Tensor | None,
    text_factor: Tensor | None,
    row_lse: Tensor,
    col_lse: Tensor,
    row_weight: Tensor,
    col_weight: Tensor,
    first_label: int,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = _Sums(image, text, logit_scale, image_factor, text_factor, wide, row_weight, col_weight)
    for tile in _tiles(image, text, image_factor, text_factor, first_label):
        x, i, j = tile.product * logit_scale, tile.i, tile.j
        g = (x - row_lse[0, i, None]).sub_(row_lse[1, i, None]).exp_().mul_(row_weight[i, None])
        g += x.sub_(col_lse[0, j]).sub_(col_lse[1, j]).exp_().mul_(col_weight[j])
        label = tile.label(g)
        label -= row_weight[tile.labelled_rows()]
        label -= tile.label(col_weight[j].expand_as(g))
        sums.add(tile, g)
    return sums.result()


def _siglip_statistics(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_factor: Tensor | None,
    text_factor: Tensor | None,
    first_label: int,
) -> Tensor:
    row_loss = image.new_zeros(image.shape[:1], dtype=accumulation_dtype(image.dtype))
    for tile in _tiles(image, text, image_factor, text_factor, first_label):
        x = tile.product.mul_(logit_scale).add_(logit_bias)
        tile.label(x).neg_()
        row_loss[tile.i] -= F.logsigmoid(x.neg_()).sum(1)
    return row_loss


def _siglip_gradients(
    image: Tensor,
    text: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    image_factor: Tensor | None,
    text_factor: Tensor | None,
    row_weight: Tensor,
    first_label: int,
    wide: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = _Sums(image, text, logit_scale, image_factor, text_factor, wide, row_weight)
    d_bias = torch.zeros_like(sums.d_scale)
    row_loss = torch.zeros_like(row_weight)
    for tile in _tiles(image, text, image_factor, text_factor, first_label):
        g = tile.product * logit_scale + logit_bias
        # -z·σ(-z·x): σ(x) beside the labels, -σ(-x) at them
        tile.label(g).neg_()
        row_loss[tile.i] -= F.logsigmoid(-g).sum(1)
        g.sigmoid_()
        tile.label(g).neg_()
        g *= row_weight[tile.i, None]
        d_bias += g.sum()
        sums.add(tile, g)
    return row_loss, *sums.result(), d_bias


class _Sums:
    """The gradients that tiles of G add up to."""

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: Tensor,
        image_factor: Tensor | None,
        text_factor: Tensor | None,
        wide: bool,
        *weights: Tensor,
    ) -> None:
        dtype = accumulation_dtype(image.dtype)
        self.logit_scale, self.image_factor, self.text_factor = logit_scale, image_factor, text_factor
        self.dtype = dtype if wide else image.dtype
        self.d_image = image.new_empty(image.shape, dtype=self.dtype)
        self.d_text = text.new_zeros(text.shape, dtype=dtype)
        self.d_scale = image.new_zeros((), dtype=dtype)
        self._rows: Tensor | None = None
        self._mixed = contrastive_products.takes(image)
        factors = tuple(f for f in (image_factor, text_factor) if f is not None)
        self._power = contrastive_products.scale_of(image, weights, factors) if self._mixed else None

    def add(self, tile: _Tile, g: Tensor) -> None:
        """Add a tile's share; ``g`` is used up."""
        with torch.autocast(g.device.type, enabled=False):
            self.d_scale += torch.sum(g * tile.product)
            if self._mixed:
                _scale(g, self.image_factor, self.text_factor, tile.i, tile.j)
                self.d_text[tile.j] += contrastive_products.weighted(g.T, tile.image, self._power)
                rows = contrastive_products.weighted(g, tile.text, self._power)
            else:
                self.d_text[tile.j] += g.T @ tile.image
                rows = g @ tile.text
        # the tiles of one block of rows come one behind the other
        self._rows = rows if tile.j.start == 0 else self._rows.add_(rows)
        if tile.j.stop == self.d_text.shape[0]:
            factor = None if self._mixed else self.image_factor
            self.d_image[tile.i] = _scaled(self._rows * self.logit_scale, factor, tile.i)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        self.d_text *= self.logit_scale
        if self.text_factor is not None and not self._mixed:
            self.d_text *= self.text_factor[:, None]
        return self.d_image, self.d_text.to(self.dtype), self.d_scale


def _fake_statistics(image: Tensor, text: Tensor, *_: object) -> tuple[Tensor, ...]:
    dtype = accumulation_dtype(image.dtype)
    rows, columns = (t.new_empty(t.shape[:1], dtype=dtype) for t in (image, text))
    lse = (t.new_empty(2, t.shape[0]) for t in (rows, columns))
    return *lse, torch.empty_like(rows), rows, columns


def _fake_gradients(image: Tensor, text: Tensor, *rest: object) -> tuple[Tensor, ...]:
    # `wide` is the only flag, and comes last
    dtype = accumulation_dtype(image.dtype)
    of_features = dtype if rest[-1] is True else image.dtype
    return *(x.new_empty(x.shape, dtype=of_features) for x in (image, text)), image.new_empty((), dtype=dtype)


def _fake_siglip_statistics(image: Tensor, *_: object) -> Tensor:
    return image.new_empty(image.shape[:1], dtype=accumulation_dtype(image.dtype))


def _fake_siglip_gradients(image: Tensor, text: Tensor, *rest: object) -> tuple[Tensor, ...]:
    gradients = _fake_gradients(image, text, *rest)
    return _fake_siglip_statistics(image), *gradients, torch.empty_like(gradients[-1])


_NAMES = ("contrastive_statistics", "contrastive_gradients", "siglip_statistics", "siglip_gradients")
_CHUNKED = (_statistics, _gradients, _siglip_statistics, _siglip_gradients)
_FAKES = (_fake_statistics, _fake_gradients, _fake_siglip_statistics, _fake_siglip_gradients)

_definitions = torch.library.Library("clipfast", "FRAGMENT")
for _name, _kernel, _fake in zip(_NAMES, _CHUNKED, _FAKES, strict=True):
    # The function's own signature is the schema: the text in csrc/library.cpp is not there where the library is not.
    # tests/ops/test_library.py compares the two. An offset is a constant of a trace, as it is for the library.
    _schema = torch.library.infer_schema(_kernel, mutates_args=()).replace("SymInt", "int")
    _definitions.define(f"{_name}_chunked{_schema}")
    _definitions.impl(f"{_name}_chunked", _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"clipfast::{_name}_chunked", _fake, lib=_definitions)

chunked = Kernels(*(getattr(torch.ops.clipfast, f"{name}_chunked") for name in _NAMES))

#: By the kernels' fields: empty results of the right shapes and dtypes.
fakes = dict(zip(Kernels._fields, _FAKES, strict=True))

#: Why the op library's kernels cannot be used, or None.
native_unavailable = library.unavailable()
native: Kernels | None = None
if native_unavailable is None:
    for _name, _fake in zip(_NAMES, _FAKES, strict=True):
        torch.library.register_fake(f"clipfast::{_name}", _fake, lib=_definitions)
    native = Kernels(*(getattr(torch.ops.clipfast, name) for name in _NAMES))

#: The types of devices that the op library has kernels for.
native_devices: frozenset[str] = frozenset()
if native is not None:
    native_devices = frozenset({"cpu"} if library.build_info()["cuda"] == "none" else {"cpu", "cuda"})
