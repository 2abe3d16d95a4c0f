"""The vision transformer of CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.modules import inference, plainness
from clipfast.modules.block import LayerNorm
from clipfast.modules.locking import set_trainable, unlock_last
from clipfast.modules.plainness import is_untouched
from clipfast.modules.shortcuts import is_observed
from clipfast.modules.transformer import Transformer
from clipfast.ops import transfer
from clipfast.ops.dispatch import leaves_clipfast


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


def interpolate_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample learned position embeddings to another grid of patches, as open_clip does.

    Args:
        positions: ``[1 + h·w, W]``: the class token's row, then the old grid's, row by row.
        old_grid: ``(h, w)``.
        new_grid: ``(h', w')``.

    Returns:
        ``[1 + h'·w', W]`` in the dtype of ``positions``; bicubic with antialiasing, the class token's row unchanged.

    Raises:
        ValueError: ``positions`` has not ``1 + h·w`` rows.
    """
    if positions.shape[0] != 1 + old_grid[0] * old_grid[1]:
        raise ValueError(
            f"positions: got {positions.shape[0]} rows, expected 1 + {old_grid[0]}·{old_grid[1]} for the old grid"
        )
    grid = positions[1:].reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    dtype = torch.promote_types(grid.dtype, torch.float32)
    grid = F.interpolate(grid.to(dtype), size=new_grid, mode="bicubic", antialias=True, align_corners=False)
    grid = grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)
    return torch.cat([positions[:1], grid])


class PatchDropout(nn.Module):
    """In training, keep a random share of the patches of every image, and the class token always.

    Args:
        prob: The share that is dropped, at least 0 and less than 1.

    Source: Li et al., "Scaling Language-Image Pre-training via Masking" (FLIP, 2022).
    """

    def __init__(self, prob: float) -> None:
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"PatchDropout(prob): got {prob}, expected at least 0 and less than 1")
        self.prob = prob

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, 1 + kept, W]`` from ``[B, 1 + patches, W]``."""
        if not self.training or self.prob == 0:
            return x
        batch, patches = x.shape[0], x.shape[1] - 1
        kept = max(1, int(patches * (1 - self.prob)))
        # drawn on the CPU, as open_clip draws it: one seed keeps the same patches on every device. What a CUDA graph
        # draws anew at every replay is drawn on the card
        source = x.device if transfer.is_capturing(x.device) else "cpu"
        chosen = torch.randn(batch, patches, device=source).topk(kept, dim=-1).indices
        chosen = transfer.to_device(chosen, x.device)
        rows = torch.arange(batch, device=x.device)[:, None]
        return torch.cat([x[:, :1], x[:, 1:][rows, chosen]], dim=1)


class ViT(nn.Module):
    """CLIP's vision transformer: images to pooled features, in OpenAI's key layout (without ``visual.``).

    Args:
        image_size: Pixels a side, or ``(height, width)``.
        patch_size: Pixels a patch's side.
        width: The width W of tokens.
        layers: The number of blocks.
        heads: The number of heads.
        mlp_ratio: The MLPs' hidden width over W.
        output_dim: The width E of features; None leaves the projection out and gives features of width W.
        approximate: The GELU: ``"none"`` (erf), ``"tanh"`` or ``"quick"`` (OpenAI's weights).
        patch_dropout: The share of patches dropped in training.

    Attributes:
        weights_grid: The grid of patches of weights that this model is meant to take, ``(rows, columns)``, where that
            is another than its own; set by :func:`clipfast.create_model`.

    Raises:
        ValueError: ``image_size`` is not a multiple of ``patch_size``, ``heads`` does not divide ``width``, or
            ``approximate`` or ``patch_dropout`` is not one of their values.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), with CLIP's LayerNorm before the first block.
    """

    def __init__(
        self,
        image_size: int | tuple[int, int] = 224,
        patch_size: int = 32,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        output_dim: int | None = 512,
        *,
        approximate: str = "none",
        patch_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.output_dim = output_dim
        self.weights_grid: tuple[int, int] | None = None
        self.image_size, self.grid_size = self._sizes(image_size)
        scale = width**-0.5
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + self.grid_size[0] * self.grid_size[1], width))
        self.proj = None if output_dim is None else nn.Parameter(scale * torch.randn(width, output_dim))
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.patch_dropout = PatchDropout(patch_dropout)
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, mlp_ratio, approximate)
        self.ln_post = LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: ``[B, 3, height, width]``, normalised, in the dtype of the weights (any float under autocast).

        Returns:
            Pooled features ``[B, E]``, not normalised: the class token after the last LayerNorm and projection.

        Raises:
            TypeError, ValueError: ``images`` is not as described.
        """
        return inference.each_alone(self._features, images, lambda: self._is_batch_invariant(images))

    def _features(self, images: Tensor) -> Tensor:
        # only the class token is read: the last block and LayerNorm compute no other
        return self._project(self.ln_post(self.transformer(self._embed(images), read=0)))

    def _is_batch_invariant(self, images: Tensor) -> bool:
        return self.transformer.packed_encoder(images) is not None and not is_observed(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return all tokens after the last LayerNorm, ``[B, 1 + patches, W]``, class token first."""
        return self.ln_post(self.transformer(self._embed(images)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> dict[str, Tensor | list[Tensor]]:
        """Return pooled features and the tokens after chosen blocks, with open_clip's arguments and names.

        Args:
            x: Images ``[B, 3, height, width]``.
            indices: The last n blocks (an int), those named (a sequence; negative from the end), or all (None).
            stop_early: Whether the blocks behind the last chosen one are left out, for the features too.
            normalize_intermediates: Whether the last LayerNorm is applied to the tokens.
            intermediates_only: Whether features are left out.
            output_fmt: ``"NCHW"``, patches as maps ``[B, W, rows, columns]``, or ``"NLC"``, ``[B, patches, W]``.
            output_extra_tokens: Whether the class token is returned as well.

        Returns:
            ``image_intermediates``, a list in the order of the blocks; ``image_intermediates_prefix`` where it is asked
            for, a list of ``[B, 1, W]``; and ``image_features`` ``[B, E]``, not normalised.

        Raises:
            ValueError: An index is outside the blocks, or ``output_fmt`` is none of these.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NLC'")
        x, chosen = self.transformer.intermediates(self._embed(x), indices, stop_early=stop_early)
        if normalize_intermediates:
            chosen = [self.ln_post(tokens) for tokens in chosen]
        patches = [tokens[:, 1:] for tokens in chosen]
        if output_fmt == "NCHW":
            patches = [p.transpose(1, 2).unflatten(2, self.grid_size).contiguous() for p in patches]
        output: dict[str, Tensor | list[Tensor]] = {"image_intermediates": patches}
        if output_extra_tokens:
            output["image_intermediates_prefix"] = [tokens[:, :1] for tokens in chosen]
        if not intermediates_only:
            output["image_features"] = self._project(self.ln_post(x[:, 0]))
        return output

    def get_attention_maps(self, images: Tensor) -> Tensor:
        """Return the attention weights of every block and head, ``[layers, B, H, N, N]`` (query, key).

        N counts the class token, at index 0, and the patches, row by row.
        """
        return self.transformer.attention_maps(self._embed(images))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training; see :attr:`Transformer.grad_checkpointing`."""
        self.transformer.grad_checkpointing = enable

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all parameters but those of the last groups, as open_clip does.

        Args:
            unlocked_groups: How many groups still learn. From the last: the projection; the last block with the last
                LayerNorm; the other blocks, each a group; patch, class and position embeddings with the first
                LayerNorm.
            freeze_bn_stats: Accepted as in open_clip; there is no BatchNorm here.

        Source: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning" (2021).
        """
        set_trainable([self], False)
        embeddings = [self.conv1, self.class_embedding, self.positional_embedding, self.ln_pre]
        *blocks, last = self.transformer.resblocks
        unlock_last([embeddings, *([b] for b in blocks), [last, self.ln_post], [self.proj]], unlocked_groups)

    @torch.no_grad()
    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Take images of another size from now on, with interpolated position embeddings.

        The position embeddings become a new Parameter: make optimizers after this.

        Raises:
            ValueError: ``image_size`` is not a multiple of the patch size.
        """
        size, grid = self._sizes(image_size)
        if grid != self.grid_size:
            old = self.positional_embedding
            positions = interpolate_positions(old, self.grid_size, grid)
            self.positional_embedding = nn.Parameter(positions, requires_grad=old.requires_grad)
        self.image_size, self.grid_size = size, grid

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare beside biases and norms."""
        return {"positional_embedding", "class_embedding"}

    def _sizes(self, image_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"ViT(image_size): got {height}×{width}, expected multiples of patch_size = {self.patch_size}"
            )
        return (height, width), (height // self.patch_size, width // self.patch_size)

    def _embed(self, images: Tensor) -> Tensor:
        check_images(images, *self.image_size, self.conv1.weight)
        x = self._patches(images)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        return self.ln_pre(self.patch_dropout(x))

    def _patches(self, images: Tensor) -> Tensor:
        """Return ``[B, patches, W]``: the convolution's patches do not overlap, so it is a product."""
        if not self._is_product() or leaves_clipfast():
            return self.conv1(images).flatten(2).transpose(1, 2)
        size, (rows, columns) = self.patch_size, self.grid_size
        pixels = images.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        pixels = pixels.flatten(3).flatten(0, 2)
        x = inference.linear(self.conv1, pixels, self.conv1.weight, lambda w: w.flatten(1))
        if x is None:
            # tokens lie behind each other at once, which a convolution's have to be brought to
            x = F.linear(pixels, self.conv1.weight.flatten(1))
        return x.unflatten(0, (-1, rows * columns))

    def _is_product(self) -> bool:
        """Return whether the convolution is one of patches that nobody watches or has changed."""
        conv, size = self.conv1, (self.patch_size, self.patch_size)
        return (
            is_untouched(conv, plainness.CONVOLUTIONS)
            and conv.bias is None
            and conv.weight.shape[2:] == size == conv.stride
            and type(conv.weight) in (nn.Parameter, Tensor)
            and conv.padding == (0, 0)
            and conv.dilation == (1, 1)
            and conv.groups == 1
        )

    def _project(self, pooled: Tensor) -> Tensor:
        return inference.project(self, pooled, self.proj)
