"""Pictures of any aspect as patches: one picture's, and a batch of them packed one behind the other, without padding.

Source: Dehghani et al., "Patch n' Pack: NaViT" (2023), and Tschannen et al., "SigLIP 2" (2025), whose NaFlex it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clipfast.ops.attention_packed import offsets_of


class Patches(NamedTuple):
    """One picture, cut into patches.

    Attributes:
        patches: ``[rows · columns, 3·P·P]``, row by row; the values of a patch in the order of a convolution's weight:
            channel, row, column.
        grid: ``(rows, columns)``.
    """

    patches: Tensor
    grid: tuple[int, int]


def cut(images: Tensor, patch_size: int) -> Tensor:
    """Return patches ``[..., rows · columns, 3·P·P]`` of images ``[..., 3, rows · P, columns · P]``, as in Patches."""
    pixels = images.unflatten(-1, (-1, patch_size)).unflatten(-3, (-1, patch_size))
    # [..., channel, rows, P, columns, P]
    return pixels.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)


def uncut(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Return images ``[B, 3, rows · P, columns · P]`` of patches ``[B, rows · columns, 3·P·P]``."""
    parts = patches.unflatten(1, grid).unflatten(-1, (3, patch_size, patch_size))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def size_of(images: Tensor, patch_size: int) -> tuple[int, int] | None:
    """Return the height and width of images ``[B, 3, H, W]``, or None where they are none.

    Raises:
        ValueError: They are no multiples of the patch size.
    """
    if not isinstance(images, Tensor) or images.dim() != 4:
        return None
    height, width = images.shape[2:]
    if min(height, width) < patch_size or height % patch_size or width % patch_size:
        raise ValueError(f"images: got {height}×{width} pixels, expected multiples of patch_size = {patch_size}")
    return height, width


@dataclass(frozen=True, eq=False, repr=False)
class NaFlexBatch:
    """Pictures of any aspect as one sequence of patches, which ``ViT(naflex=True)`` takes in the place of images.

    Args:
        patches: ``[total, 3·P·P]``, floating point, normalised: the pictures' patches one behind the other; see
            :class:`Patches`.
        grids: ``[B, 2]`` in host memory, or pairs of ints: each picture's ``(rows, columns)``.

    Attributes:
        grids: int64 ``[B, 2]`` in host memory.
        cu_seqlens: int64 ``[B + 1]`` in host memory: where each picture begins among the patches, and the end.

    Raises:
        TypeError: ``patches`` or ``grids`` is of another type or dtype.
        ValueError: The shapes do not fit, the grids lie on a device, one is empty, or they are not as many patches as
            came.
    """

    patches: Tensor
    grids: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "grids", _checked_grids(self.grids))
        object.__setattr__(self, "cu_seqlens", offsets_of(self.lengths))
        if not isinstance(self.patches, Tensor) or not self.patches.is_floating_point():
            came = self.patches.dtype if isinstance(self.patches, Tensor) else type(self.patches).__name__
            raise TypeError(f"NaFlexBatch(patches): got {came}, expected a floating-point tensor [total, 3·P·P]")
        if self.patches.dim() != 2 or 3 * self.patch_size**2 != self.patches.shape[1]:
            raise ValueError(f"NaFlexBatch(patches): got shape {tuple(self.patches.shape)}, expected [total, 3·P·P]")
        if len(self.patches) != self.total:
            raise ValueError(
                f"NaFlexBatch(patches): got {len(self.patches)} patches, expected {self.total}, those of the grids"
            )

    @classmethod
    def of(cls, pictures: Iterable[Patches]) -> NaFlexBatch:
        """Pack pictures in their order, as :func:`clipfast.naflex_transform` gives them.

        Raises:
            ValueError: There is none, or they are of several patch sizes, dtypes or devices.
        """
        pictures = list(pictures)
        if not pictures:
            raise ValueError("NaFlexBatch.of(pictures): got none, expected at least one")
        kinds = {(p.patches.shape[1:], p.patches.dtype, p.patches.device) for p in pictures}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{tuple(shape)} {dtype} on {device}" for shape, dtype, device in kinds))
            raise ValueError(f"NaFlexBatch.of(pictures): got patches {found}, expected those of one kind")
        for i, (patches, grid) in enumerate(pictures):
            if len(patches) != math.prod(grid):
                raise ValueError(
                    f"NaFlexBatch.of(pictures): got {len(patches)} patches for picture {i}, expected "
                    f"{grid[0]}·{grid[1]}, its grid"
                )
        return cls(torch.cat([p.patches for p in pictures]), [p.grid for p in pictures])

    @classmethod
    def from_padded(cls, pixel_values: Tensor, pixel_attention_mask: Tensor, spatial_shapes: Tensor) -> NaFlexBatch:
        """Pack what transformers' ``Siglip2ImageProcessor`` gives, without its padding.

        Args:
            pixel_values: ``[B, N, P·P·3]``, the values of a patch in the order of row, column, channel.
            pixel_attention_mask: ``[B, N]``: 1 for patches, which come first, and 0 for padding.
            spatial_shapes: ``[B, 2]``: each picture's ``(rows, columns)``.

        Raises:
            ValueError: The shapes do not fit, or the mask leaves others than the first ``rows · columns``.
        """
        if pixel_values.dim() != 3 or pixel_attention_mask.shape != pixel_values.shape[:2]:
            raise ValueError(
                f"from_padded(pixel_values): got {tuple(pixel_values.shape)} and a mask "
                f"{tuple(pixel_attention_mask.shape)}, expected [B, N, P·P·3] and [B, N]"
            )
        grids = spatial_shapes.cpu()
        ends = grids.prod(dim=1, keepdim=True).to(pixel_values.device)
        there = torch.arange(pixel_values.shape[1], device=pixel_values.device) < ends
        if not torch.equal(there, pixel_attention_mask.to(pixel_values.device).bool()):
            raise ValueError("from_padded(pixel_attention_mask): got another than 1 for each picture's first patches")
        patches = pixel_values[there].unflatten(1, (-1, 3)).transpose(1, 2).flatten(1)
        return cls(patches, grids)

    def __len__(self) -> int:
        """Return B, the number of pictures."""
        return len(self.grids)

    def __repr__(self) -> str:
        """Return what it holds, without its values."""
        return f"NaFlexBatch({len(self)} pictures, {self.total} patches, {self.dtype} on {self.device})"

    @property
    def lengths(self) -> Tensor:
        """The pictures' numbers of patches, ``[B]`` in host memory."""
        return self.grids[:, 0] * self.grids[:, 1]

    @property
    def total(self) -> int:
        """The number of patches."""
        return int(self.cu_seqlens[-1])

    @property
    def patch_size(self) -> int:
        """P, pixels a patch's side."""
        return math.isqrt(self.patches.shape[-1] // 3)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the patches."""
        return self.patches.dtype

    @property
    def device(self) -> torch.device:
        """Where the patches are."""
        return self.patches.device

    def to(self, *args: Any, **kwargs: Any) -> NaFlexBatch:
        """Return the batch with its patches on another device or in another dtype; the arguments are ``Tensor.to``'s.

        Grids and offsets stay in host memory, where the model wants them.
        """
        return self._with(self.patches.to(*args, **kwargs))

    def pin_memory(self) -> NaFlexBatch:
        """Return the batch with its patches in page-locked memory, for copies to a GPU that nothing waits for."""
        return self._with(self.patches.pin_memory())

    def split(self, sizes: int | Sequence[int]) -> list[NaFlexBatch]:
        """Return batches of the next so many pictures each, views of this one; the arguments are ``Tensor.split``'s."""
        parts, first = [], 0
        for grids in self.grids.split(sizes):
            last = first + len(grids)
            parts.append(NaFlexBatch(self.patches[self.cu_seqlens[first] : self.cu_seqlens[last]], grids))
            first = last
        return parts

    def _with(self, patches: Tensor) -> NaFlexBatch:
        return self if patches is self.patches else NaFlexBatch(patches, self.grids)


def _checked_grids(grids: Tensor | Sequence[tuple[int, int]]) -> Tensor:
    """Return grids as int64 ``[B, 2]`` in host memory."""
    name = "NaFlexBatch(grids)"
    if not isinstance(grids, Tensor):
        grids = [tuple(grid) for grid in grids]
        grids = torch.tensor(grids, device="cpu") if grids else torch.empty(0, 2, dtype=torch.int64, device="cpu")
    if grids.device.type != "cpu":
        raise ValueError(
            f"{name}: got them on {grids.device}, expected host memory: they say how much is to be computed"
        )
    if grids.is_floating_point() or grids.is_complex() or grids.dtype == torch.bool:
        raise TypeError(f"{name}: got {grids.dtype}, expected integers")
    if grids.dim() != 2 or grids.shape[1] != 2 or not len(grids):
        raise ValueError(f"{name}: got shape {tuple(grids.shape)}, expected [B, 2], (rows, columns) of each picture")
    if int(grids.min()) < 1:
        raise ValueError(
            f"{name}: got a grid of {tuple(grids[grids.min(dim=1).values < 1][0].tolist())}, expected 1 × 1 or more"
        )
    # of its own: offsets are made of it once
    return grids.to(torch.int64, copy=True)
