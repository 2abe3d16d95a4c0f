"""The contrastive losses as modules, with open_clip's arguments and calls."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from clipfast import ops


def _process_group(owner: str, rank: int, world_size: int) -> dist.ProcessGroup | None:
    """Return the default process group, or None for one process; raise where it is not what the caller says."""
    if world_size == 1:
        return None
    if not dist.is_initialized():
        raise RuntimeError(
            f"{owner}(world_size={world_size}): torch.distributed has no process group, expected one of that size"
        )
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"{owner}: got rank {rank} of {world_size}, expected {dist.get_rank()} of {dist.get_world_size()} as in "
            f"torch.distributed"
        )
    return dist.group.WORLD


class ContrastiveLoss(nn.Module):
    """CLIP's symmetric cross-entropy between images and texts; takes the place of open_clip's ``ClipLoss``.

    With more than one rank, gradients after DDP's mean equal those of one process with the joined batch, whatever
    the flags: the combination of open_clip's flags that gives other gradients is refused, and its default, whose
    gradients are ``world_size`` times too small there, is made right here.

    Args:
        local_loss: Accepted as in open_clip; the work is shared between ranks as the op sees fit.
        gather_with_grad: Accepted as in open_clip; gathered features always carry their gradients here.
        cache_labels: Accepted as in open_clip; there are no labels to cache.
        rank: This process's rank.
        world_size: The number of processes; with 1, no process group is used.
        use_horovod: Must be False.
        comm: How texts reach the other ranks, ``"gather"`` or ``"ring"``: see :func:`clipfast.ops.contrastive_loss`.
        equal_batches: The promise that all ranks hold equally many rows, which spares an exchange of sizes.

    Raises:
        ValueError: ``local_loss`` without ``gather_with_grad`` on more than one rank, Horovod, or a rank or size
            that is not torch.distributed's.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021).
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        comm: str = "gather",
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("ContrastiveLoss(use_horovod): got True, expected False: torch.distributed is used")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError(
                "ContrastiveLoss(local_loss=True, gather_with_grad=False): this combination gives wrong gradients on "
                "more than one rank (features of other ranks get none); pass gather_with_grad=True"
            )
        self.rank = rank
        self.world_size = world_size
        self.comm = comm
        self.equal_batches = equal_batches

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: ``[B, D]``, L2-normalised.
            text_features: ``[B, D]``, L2-normalised.
            logit_scale: A scalar, ``model.logit_scale.exp()``.
            logit_bias: Added to every logit; it cannot change this loss.
            output_dict: Whether to return ``{"contrastive_loss": loss}``.

        Returns:
            A scalar, the loss of the batch joined over ranks (or the dict around it).

        Raises:
            TypeError, ValueError: As :func:`clipfast.ops.contrastive_loss`.
        """
        group = _process_group("ContrastiveLoss", self.rank, self.world_size)
        loss = ops.contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            group=group,
            comm=self.comm,
            equal_batches=self.equal_batches,
        )
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss between images and texts; takes the place of open_clip's ``SigLipLoss``.

    Args:
        cache_labels: Accepted as in open_clip; there are no labels to cache.
        rank: This process's rank.
        world_size: The number of processes; with 1, no process group is used.
        dist_impl: Accepted as in open_clip (``bidir``, ``shift``, ``reduce``, ``gather``): all four compute the same.
        comm: As in :class:`ContrastiveLoss`.
        equal_batches: As in :class:`ContrastiveLoss`.

    Raises:
        ValueError: ``dist_impl`` is none of these, or a rank or size is not torch.distributed's.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        comm: str = "gather",
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in known:
            raise ValueError(f"SigLipLoss(dist_impl): got {dist_impl!r}, expected one of {', '.join(known)}")
        self.rank = rank
        self.world_size = world_size
        self.comm = comm
        self.equal_batches = equal_batches

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: ``[B, D]``, L2-normalised.
            text_features: ``[B, D]``, L2-normalised.
            logit_scale: A scalar, ``model.logit_scale.exp()``.
            logit_bias: A scalar, ``model.logit_bias``; None means 0.
            output_dict: Whether to return ``{"contrastive_loss": loss}``.

        Returns:
            A scalar; its mean over ranks is the loss of the joined batch (or the dict around it).

        Raises:
            TypeError, ValueError: As :func:`clipfast.ops.siglip_loss`.
        """
        group = _process_group("SigLipLoss", self.rank, self.world_size)
        loss = ops.siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            group=group,
            comm=self.comm,
            equal_batches=self.equal_batches,
        )
        return {"contrastive_loss": loss} if output_dict else loss
