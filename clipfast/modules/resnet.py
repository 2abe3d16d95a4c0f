"""The modified ResNet of CLIP: three-convolution stem, anti-aliased strides, attention pooling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from clipfast import ops
from clipfast.modules import inference
from clipfast.modules.locking import set_trainable
from clipfast.modules.transformer import chosen_indices
from clipfast.modules.vit import check_images


class Bottleneck(nn.Module):
    """A bottleneck block whose stride is an average pool after the second convolution.

    Args:
        in_channels: Channels that come in.
        channels: Channels between the 1×1 convolutions; four times as many go out.
        stride: 1, or 2 to halve the resolution.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.stride = stride
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1 or in_channels != out_channels:
            # the layout numbers these two 0 and 1; the pool before them has no parameters
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, 4·channels, h/stride, w/stride]`` from ``[B, in_channels, h, w]``."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self._pool(y)))
        skip = x if self.downsample is None else self.downsample(self._pool(x))
        return F.relu(y + skip, inplace=True)

    def _pool(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, self.stride) if self.stride > 1 else x


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Leave the running statistics of BatchNorm alone while a forward pass is computed a second time."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, batches in kept:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


class FrozenBatchNorm2d(nn.Module):
    """A BatchNorm whose weights and statistics are constants, under the same keys.

    Args:
        source: Whose they were, ``[C]`` each.
    """

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.eps = source.eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(source, name).detach().clone())
        self.train(source.training)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # a BatchNorm's counter
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, C, h, w]`` from ``[B, C, h, w]``."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class AttentionPool2d(nn.Module):
    """Pool a feature map by attention whose one query is its mean.

    Args:
        grid_size: The map's side.
        width: The map's channels C.
        heads: The number of heads.
        output_dim: The width E of features.
    """

    def __init__(self, grid_size: int, width: int, heads: int, output_dim: int) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"AttentionPool2d(heads): got {heads} for width {width}, expected a divisor of the width")
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(grid_size**2 + 1, width) / width**0.5)
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output_dim)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[B, E]`` from ``[B, C, h, w]``."""
        tokens = x.flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.to(tokens.dtype)
        # only the mean's query is read, so only it is formed
        query, key, value = self.q_proj(tokens[:, 0]), self.k_proj(tokens), self.v_proj(tokens)
        return self.c_proj(ops.single_query_attention(query, key, value, self.heads))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: images to pooled features, in OpenAI's key layout (without ``visual.``).

    Args:
        layers: The number of bottlenecks of each of the four stages.
        output_dim: The width E of features.
        heads: The attention pool's number of heads.
        image_size: Pixels a side, a multiple of 32.
        width: Channels after the stem; the last stage gives 32 times as many.

    Attributes:
        grad_checkpointing: Whether training keeps only each bottleneck's input and computes the rest again in the
            backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).

    Raises:
        ValueError: ``layers`` has not four entries, ``image_size`` is not a multiple of 32, or ``heads`` does not
            divide the last width.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), 2.4.
    """

    def __init__(
        self, layers: Sequence[int], output_dim: int, heads: int, image_size: int = 224, width: int = 64
    ) -> None:
        super().__init__()
        if len(layers) != 4:
            raise ValueError(f"ModifiedResNet(layers): got {tuple(layers)}, expected four numbers, one a stage")
        if image_size < 32 or image_size % 32:
            raise ValueError(f"ModifiedResNet(image_size): got {image_size}, expected a multiple of 32")
        self.output_dim = output_dim
        self.image_size = (image_size, image_size)
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for stage, blocks in enumerate(layers):
            planes = width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            bottlenecks = []
            for stride in strides:
                bottlenecks.append(Bottleneck(channels, planes, stride))
                channels = planes * Bottleneck.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*bottlenecks))
        self.attnpool = AttentionPool2d(image_size // 32, channels, heads, output_dim)
        for module in self.modules():
            if isinstance(module, Bottleneck):
                # each residual branch starts at zero (Goyal et al., 2017)
                nn.init.zeros_(module.bn3.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: ``[B, 3, image_size, image_size]``, normalised, in the dtype of the weights (any float under
                autocast).

        Returns:
            Pooled features ``[B, E]``, not normalised.

        Raises:
            TypeError, ValueError: ``images`` is not as described.
        """
        # in training, BatchNorm is there for its batch
        return inference.each_alone(self._features, images, lambda: self.training)

    def _features(self, images: Tensor) -> Tensor:
        return self.attnpool(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last stage's map, ``[B, 32·width, image_size/32, image_size/32]``."""
        return self._maps(images)[-1]

    # twice: open_clip's signature, of each kind of tower
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
        """Return pooled features and chosen maps, with open_clip's arguments and names.

        Args:
            x: Images ``[B, 3, image_size, image_size]``.
            indices: Which of five, the stem's and the four stages': the last n (an int), those named (a sequence;
                negative from the end), or all (None).
            stop_early: Whether stages behind the last chosen one are left out where no features are asked for.
            normalize_intermediates: Accepted as in open_clip; there is no last norm.
            intermediates_only: Whether features are left out.
            output_fmt: Must be ``"NCHW"``.
            output_extra_tokens: Accepted as in open_clip; there are no other tokens.

        Returns:
            ``image_intermediates``, a list of ``[B, C, h, w]`` in the order of the stages, and ``image_features``
            ``[B, E]``, not normalised.

        Raises:
            ValueError: An index is outside the stages, or ``output_fmt`` is another.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt: got {output_fmt!r}, expected 'NCHW'")
        wanted = chosen_indices(indices, 5)
        maps = self._maps(x, max(wanted) if stop_early and intermediates_only and wanted else 4)
        output: dict[str, Tensor | list[Tensor]] = {
            "image_intermediates": [m for i, m in enumerate(maps) if i in wanted]
        }
        if not intermediates_only:
            output["image_features"] = self.attnpool(maps[-1])
        return output

    def _maps(self, images: Tensor, last: int = 4) -> list[Tensor]:
        """Return the maps after the stem and after the stages up to the ``last``, as ``[B, C, h, w]``."""
        check_images(images, *self.image_size, self.conv1.weight)
        maps = [self._stem(images)]
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:last]:
            x = maps[-1]
            for block in stage:
                x = self._run(block, x)
            maps.append(x)
        return maps

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze all parameters, as open_clip does.

        Args:
            unlocked_groups: Must be 0.
            freeze_bn_stats: Whether BatchNorms become :class:`FrozenBatchNorm2d`, which use their running statistics in
                training too, and whose weights are buffers.

        Raises:
            ValueError: ``unlocked_groups`` is not 0.

        Source: Zhai et al., "LiT: Zero-Shot Transfer with Locked-image text Tuning" (2021).
        """
        if unlocked_groups:
            raise ValueError(f"unlocked_groups: got {unlocked_groups}, expected 0: a ResNet is frozen as a whole")
        set_trainable([self], False)
        if freeze_bn_stats:
            for module in list(self.modules()):
                for name, child in module.named_children():
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(module, name, FrozenBatchNorm2d(child))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training; see :attr:`grad_checkpointing`."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters that weight decay should spare beside biases and norms."""
        return {"attnpool.positional_embedding"}

    def _stem(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(norm(conv(x)), inplace=True)
        return F.avg_pool2d(x, 2)

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(
                block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block))
            )
        return block(x)
