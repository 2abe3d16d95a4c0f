"""What goes into an image tower: images, positions of patches, and which patches training keeps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.ops import transfer


def check_images(images: Tensor, height: int, width: int, weight: Tensor) -> None:
    """Raise unless ``images`` is ``[B, 3, height, width]`` in a dtype and on the device that ``weight`` can use."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images: got {type(images).__name__}, expected a tensor [B, 3, {height}, {width}]")
    if images.dim() != 4 or tuple(images.shape[1:]) != (3, height, width):
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected [B, 3, {height}, {width}]")
    if images.device != weight.device:
        raise ValueError(f"images: got device {images.device}, expected {weight.device}, where the model is")
    autocast = torch.is_autocast_enabled(images.device.type)
    if not images.is_floating_point() or (images.dtype != weight.dtype and not autocast):
        raise TypeError(
            f"images: got {images.dtype}, expected {weight.dtype}, the model's dtype; normalise pixels with "
            f"clipfast.image_transform and convert with images.to(dtype)"
        )


def interpolate_positions(
    positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], prefix: int = 1
) -> Tensor:
    """Resample learned position embeddings to another grid of patches, as open_clip does.

    Args:
        positions: ``[prefix + h·w, W]``: the class token's row, if there is one, then the old grid's, row by row.
        old_grid: ``(h, w)``.
        new_grid: ``(h', w')``.
        prefix: How many rows lie before the grid's.

    Returns:
        ``[prefix + h'·w', W]`` in the dtype of ``positions``; bicubic with antialiasing, the rows before unchanged.

    Raises:
        ValueError: ``positions`` has not ``prefix + h·w`` rows.
    """
    if positions.shape[0] != prefix + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"positions: got {positions.shape[0]} rows, expected {prefix} + {old_grid[0]}·{old_grid[1]} for the old "
            f"grid"
        )
    grid = positions[prefix:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    dtype = torch.promote_types(grid.dtype, torch.float32)
    grid = F.interpolate(grid.to(dtype), size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)
    return torch.cat([positions[:prefix], grid])


class PatchDropout(nn.Module):
    """In training, keep a random share of the patches of every image, and the tokens before them always.

    Args:
        prob: The share that is dropped, at least 0 and less than 1.
        prefix: How many tokens lie before the patches.

    Source: Li et al., "Scaling Language-Image Pre-training via Masking" (FLIP, 2022).
    """

    prefix = 1

    def __init__(self, prob: float, prefix: int = 1) -> None:
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"PatchDropout(prob): got {prob}, expected at least 0 and less than 1")
        self.prob, self.prefix = prob, prefix

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, prefix + kept, W]`` from ``[B, prefix + patches, W]``."""
        if not self.training or self.prob == 0:
            return x
        batch, patches = x.shape[0], x.shape[1] - self.prefix
        kept = max(1, int(patches * (1 - self.prob)))
        # drawn on the CPU, as open_clip draws it: one seed keeps the same patches on every device. What a CUDA graph
        # draws anew at every replay is drawn on the card
        source = x.device if transfer.is_capturing(x.device) else "cpu"
        chosen = torch.randn(batch, patches, device=source).topk(kept, dim=-1).indices
        chosen = transfer.to_device(chosen, x.device)
        rows = torch.arange(batch, device=x.device)[:, None]
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :][rows, chosen]], dim=1)
