"""The vision transformer of CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast.modules import inference, packed_images, plainness
from clipfast.modules.block import LayerNorm
from clipfast.modules.initialization import init_as_big_vision
from clipfast.modules.locking import set_trainable, unlock_last
from clipfast.modules.naflex import NaFlexBatch, cut, size_of
from clipfast.modules.patches import PatchDropout, check_images, interpolate_positions
from clipfast.modules.plainness import is_untouched
from clipfast.modules.pooling import AttentionPool, check_pooling, pooled
from clipfast.modules.positions import positions_for
from clipfast.modules.shortcuts import is_observed
from clipfast.modules.transformer import Transformer
from clipfast.ops.dispatch import leaves_clipfast

__all__ = ["PatchDropout", "ViT", "check_images", "interpolate_positions"]


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
        pool_type: How tokens become features: ``"tok"``, the class token; ``"avg"``, the mean of the patches;
            ``"map"``, an :class:`~clipfast.modules.pooling.AttentionPool`.
        class_token: Whether a learned token lies before the patches.
        reg_tokens: How many more do, without positions (Darcet et al., "Vision Transformers Need Registers", 2023).
        no_ln_pre: Whether the LayerNorm before the first block is left out.
        final_ln_after_pool: Whether the last LayerNorm is applied to the mean and not to the tokens (``"avg"``).
        patch_bias: Whether the embedding of patches has a bias.
        norm_eps: The LayerNorms' epsilon.
        ls_init_value: Where LayerScale's factors start; None leaves them out.
        qkv_bias: Whether the projections to queries, keys and values have a bias.
        naflex: Whether pictures of any aspect may come, as a :class:`~clipfast.NaFlexBatch` or as images of any
            multiple of the patch size: positions are resampled for them. It wants no class token and no registers.

    Attributes:
        weights_grid: The grid of patches of weights that this model is meant to take, ``(rows, columns)``, where that
            is another than its own; set by :func:`clipfast.create_model`.

    Raises:
        ValueError: ``image_size`` is not a multiple of ``patch_size`` (with ``"map"`` it need not be: what is left over
            right and below is not read, as in timm and transformers), ``heads`` does not divide ``width``,
            ``approximate``, ``patch_dropout`` or ``pool_type`` is not one of their values, or two arguments exclude
            each other.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), with CLIP's LayerNorm before the first block.
    """

    # of the class, for the twins of other libraries' towers, which set what differs
    pool_type, class_token, prefix_tokens, final_ln_after_pool, naflex = "tok", True, 1, False, False

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
        pool_type: str = "tok",
        class_token: bool = True,
        reg_tokens: int = 0,
        no_ln_pre: bool = False,
        final_ln_after_pool: bool = False,
        patch_bias: bool = False,
        norm_eps: float = 1e-5,
        ls_init_value: float | None = None,
        qkv_bias: bool = True,
        naflex: bool = False,
    ) -> None:
        super().__init__()
        if naflex and (class_token or reg_tokens):
            raise ValueError("ViT(naflex): got True with a class token or registers, expected neither")
        self.naflex = naflex
        check_pooling(pool_type, class_token, final_ln_after_pool)
        self.pool_type, self.final_ln_after_pool = pool_type, final_ln_after_pool
        self.class_token, self.prefix_tokens = class_token, int(class_token) + reg_tokens
        self.patch_size = patch_size
        self.output_dim = output_dim
        self.weights_grid: tuple[int, int] | None = None
        self.image_size, self.grid_size = self._sizes(image_size)
        scale, positions = width**-0.5, int(class_token) + self.grid_size[0] * self.grid_size[1]
        if class_token:
            self.class_embedding = nn.Parameter(scale * torch.randn(width))
        if reg_tokens:
            self.reg_tokens = nn.Parameter(scale * torch.randn(reg_tokens, width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(positions, width))
        self.proj = None if output_dim is None else nn.Parameter(scale * torch.randn(width, output_dim))
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=patch_bias)
        self.patch_dropout = PatchDropout(patch_dropout, self.prefix_tokens)
        self.ln_pre = None if no_ln_pre else LayerNorm(width, eps=norm_eps)
        self.transformer = Transformer(
            width, layers, heads, mlp_ratio, approximate,
            norm_eps=norm_eps, ls_init_value=ls_init_value, qkv_bias=qkv_bias,
        )  # fmt: skip
        self.ln_post = LayerNorm(width, eps=norm_eps)
        is_map = pool_type == "map"
        self.attn_pool = AttentionPool(width, heads, mlp_ratio, approximate, norm_eps) if is_map else None
        if is_map:
            init_as_big_vision(self)

    def forward(self, images: Tensor | NaFlexBatch) -> Tensor:
        """Encode images.

        Args:
            images: ``[B, 3, height, width]``, normalised, in the dtype of the weights (any float under autocast); with
                ``naflex`` a :class:`~clipfast.NaFlexBatch` too.

        Returns:
            Pooled features ``[B, E]``, not normalised: tokens after the last LayerNorm, pooled and projected.

        Raises:
            TypeError, ValueError: ``images`` is not as described.
        """
        return inference.each_alone(self._features, images, lambda: self._is_batch_invariant(images))

    def _features(self, images: Tensor | NaFlexBatch) -> Tensor:
        if self.naflex and isinstance(images, NaFlexBatch):
            return packed_images.features_of(self, images)
        x = self._embed(images)
        if self.pool_type == "tok":
            # only the class token is read: the last block and LayerNorm compute no other
            return self._project(self.ln_post(self.transformer(x, read=0)))
        return self._project(self._pool(self.transformer(x)))

    def _is_batch_invariant(self, images: Tensor) -> bool:
        # how other poolings add up hangs on the batch
        return self.pool_type == "tok" and self.transformer.packed_encoder(images) is not None and not is_observed(self)

    def _pool(self, x: Tensor) -> Tensor:
        """Return ``[B, W]`` from the last block's tokens ``[B, N, W]``."""
        if self.pool_type == "tok":
            return self.ln_post(x[:, 0])
        read = x if self.pool_type == "map" else x[:, self.prefix_tokens :]
        return pooled(self, read, lambda patches: patches.mean(dim=1))

    def forward_features(self, images: Tensor | NaFlexBatch) -> Tensor:
        """Return all tokens after the last LayerNorm, ``[B, prefix + patches, W]``: class token, registers, patches.

        With ``final_ln_after_pool`` they are those before it, which are pooled. Those of a
        :class:`~clipfast.NaFlexBatch` are packed, ``[total, W]``.
        """
        if self.naflex and isinstance(images, NaFlexBatch):
            return packed_images.tokens_of(self, images)
        x = self.transformer(self._embed(images))
        return x if self.final_ln_after_pool else self.ln_post(x)

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
            output_extra_tokens: Whether the tokens before the patches are returned as well.

        Returns:
            ``image_intermediates``, a list in the order of the blocks; ``image_intermediates_prefix`` where it is asked
            for and there are any, a list of ``[B, prefix, W]``; and ``image_features`` ``[B, E]``, not normalised.

        Raises:
            ValueError: An index is outside the blocks, or ``output_fmt`` is none of these.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW' or 'NLC'")
        embedded, grid = self._embed(x), self._grid_of(x)
        x, chosen = self.transformer.intermediates(embedded, indices, stop_early=stop_early)
        if normalize_intermediates:
            chosen = [self.ln_post(tokens) for tokens in chosen]
        prefix = self.prefix_tokens
        patches = [tokens[:, prefix:] for tokens in chosen]
        if output_fmt == "NCHW":
            patches = [p.transpose(1, 2).unflatten(2, grid).contiguous() for p in patches]
        output: dict[str, Tensor | list[Tensor]] = {"image_intermediates": patches}
        if output_extra_tokens and prefix:
            output["image_intermediates_prefix"] = [tokens[:, :prefix] for tokens in chosen]
        if not intermediates_only:
            output["image_features"] = self._project(self._pool(x))
        return output

    def get_attention_maps(self, images: Tensor) -> Tensor:
        """Return the attention weights of every block and head, ``[layers, B, H, N, N]`` (query, key).

        N counts the class token, at index 0, registers, and the patches, row by row.
        """
        return self.transformer.attention_maps(self._embed(images))

    def get_pool_weights(self, images: Tensor) -> Tensor:
        """Return how much each of the last block's tokens counts in the features, ``[B, H, N]``; a row sums to 1.

        Of the class token's and the mean's pooling there is one head; of ``"map"``, those of its attention.
        """
        x = self._embed(images)
        if self.pool_type == "map":
            return self.attn_pool.weights(self.ln_post(self.transformer(x)))
        read = slice(0, 1) if self.pool_type == "tok" else slice(self.prefix_tokens, None)
        weights = torch.zeros_like(x[..., 0])
        weights[:, read] = 1 / weights[:, read].shape[1]
        return weights[:, None]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training; see :attr:`Transformer.grad_checkpointing`."""
        self.transformer.grad_checkpointing = enable

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all parameters but those of the last groups, as open_clip does.

        Args:
            unlocked_groups: How many groups still learn. From the last: the projection, if there is one; the last
                block with the last LayerNorm and the pooling; the other blocks, each a group; patch, class and position
                embeddings with the first LayerNorm.
            freeze_bn_stats: Accepted as in open_clip; there is no BatchNorm here.

        Source: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning" (2021).
        """
        set_trainable([self], False)
        learned = [getattr(self, name, None) for name in ("class_embedding", "reg_tokens", "positional_embedding")]
        *blocks, last = self.transformer.resblocks
        pool = getattr(self, "attn_pool", None)
        groups = [[self.conv1, *learned, self.ln_pre], *([b] for b in blocks), [last, self.ln_post, pool]]
        unlock_last(groups if self.proj is None else [*groups, [self.proj]], unlocked_groups)

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
            positions = interpolate_positions(old, self.grid_size, grid, int(self.class_token))
            self.positional_embedding = nn.Parameter(positions, requires_grad=old.requires_grad)
        self.image_size, self.grid_size = size, grid

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare beside biases and norms."""
        names = {"positional_embedding", "class_embedding", "reg_tokens"}
        return {name for name, _ in self.named_parameters() if name in names or name == "attn_pool.probe"}

    def _sizes(self, image_size: int | tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        # SigLIP has towers of 384 pixels and patches of 14: six rows and columns are not read
        rests = self.pool_type != "map" and (height % self.patch_size or width % self.patch_size)
        if min(height, width) < self.patch_size or rests:
            raise ValueError(
                f"ViT(image_size): got {height}×{width}, expected multiples of patch_size = {self.patch_size}"
            )
        return (height, width), (height // self.patch_size, width // self.patch_size)

    def _embed(self, images: Tensor) -> Tensor:
        size = size_of(images, self.patch_size) if self.naflex else self.image_size
        check_images(images, *(size or self.image_size), self.conv1.weight)
        x = self._patches(images)
        if self.class_token:
            x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        positions = self.positional_embedding
        if self.naflex:
            (positions,) = positions_for(self, positions, self.grid_size, [self._grid_of(images)], images)
        x = x + positions.to(x.dtype)
        if self.prefix_tokens > self.class_token:
            registers = self.reg_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, : int(self.class_token)], registers, x[:, int(self.class_token) :]], dim=1)
        x = self.patch_dropout(x)
        return x if self.ln_pre is None else self.ln_pre(x)

    def _patches(self, images: Tensor) -> Tensor:
        """Return ``[B, patches, W]``: the convolution's patches do not overlap, so it is a product."""
        if not self._is_product() or leaves_clipfast():
            return self.conv1(images).flatten(2).transpose(1, 2)
        size, (rows, columns) = self.patch_size, self._grid_of(images)
        # where they do not fill an image, the rest of it is not read
        pixels = cut(images[..., : rows * size, : columns * size], size)
        # tokens lie behind each other at once, which a convolution's have to be brought to
        return self._product(pixels.flatten(0, 1)).unflatten(0, (-1, rows * columns))

    def _product(self, patches: Tensor) -> Tensor:
        """Return ``[total, W]`` from patches ``[total, 3·P·P]``, of whichever pictures."""
        conv, bias = self.conv1, self.conv1.bias
        if not self._is_product():
            return conv(patches.unflatten(1, conv.weight.shape[1:])).flatten(1)
        x = inference.linear(conv, patches, conv.weight, lambda w: w.flatten(1), bias)
        return F.linear(patches, conv.weight.flatten(1), bias) if x is None else x

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches of images that fit."""
        size = self.patch_size
        return (images.shape[2] // size, images.shape[3] // size) if self.naflex else self.grid_size

    def _is_product(self) -> bool:
        """Return whether the convolution is one of patches that nobody watches or has changed."""
        conv, size = self.conv1, (self.patch_size, self.patch_size)
        return (
            is_untouched(conv, plainness.CONVOLUTIONS)
            and (conv.bias is None or type(conv.bias) in (nn.Parameter, Tensor))
            and conv.weight.shape[2:] == size == conv.stride
            and type(conv.weight) in (nn.Parameter, Tensor)
            and conv.padding == (0, 0)
            and conv.dilation == (1, 1)
            and conv.groups == 1
        )

    def _project(self, pooled: Tensor) -> Tensor:
        return inference.project(self, pooled, self.proj)
