"""The contrastive losses as modules, with open_clip's arguments and calls."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist
import torch.distributed.nn as dist_nn
import torch.nn.functional as F
from torch import Tensor, nn

from clipfast import ops
from clipfast.ops.contrastive_arguments import check_smoothing


def _process_group(owner: str, rank: int | None, world_size: int | None) -> dist.ProcessGroup | None:
    """Return the default process group, or None for one process; raise where it is not what the caller says."""
    running = dist.is_available() and dist.is_initialized()
    if world_size is None:
        world_size = dist.get_world_size() if running else 1
    if world_size == 1:
        return None
    if not running:
        raise RuntimeError(
            f"{owner}(world_size={world_size}): torch.distributed has no process group, expected one of that size"
        )
    rank = dist.get_rank() if rank is None else rank
    if (dist.get_rank(), dist.get_world_size()) != (rank, world_size):
        raise ValueError(
            f"{owner}: got rank {rank} of {world_size}, expected {dist.get_rank()} of {dist.get_world_size()} as in "
            f"torch.distributed"
        )
    return dist.group.WORLD


def of_one_dtype(*features: Tensor | None) -> tuple[Tensor | None, ...]:
    """Widen features to one dtype under autocast, whose products take two; elsewhere the op refuses two."""
    given = [f for f in features if f is not None]
    if not all(isinstance(f, Tensor) and f.is_floating_point() for f in given) or len({f.dtype for f in given}) == 1:
        return features
    if not torch.is_autocast_enabled(given[0].device.type):
        return features
    dtype = functools.reduce(torch.promote_types, (f.dtype for f in given))
    return tuple(f if f is None else f.to(dtype) for f in features)


class ContrastiveLoss(nn.Module):
    """CLIP's symmetric cross-entropy between images and texts; takes the place of open_clip's ``ClipLoss``.

    With more than one rank, gradients after DDP's mean equal those of one process with the joined batch, whatever
    the flags: the combination of open_clip's flags that gives other gradients is refused, and its default, whose
    gradients are ``world_size`` times too small there, is made right here.

    Args:
        local_loss: Accepted as in open_clip; the work is shared between ranks as the op sees fit.
        gather_with_grad: Accepted as in open_clip; gathered features always carry their gradients here.
        cache_labels: Accepted as in open_clip; there are no labels to cache.
        rank: This process's rank; None asks torch.distributed in every call.
        world_size: The number of processes; with 1, no process group is used and the loss is of this process's batch
            alone. None asks torch.distributed in every call: all ranks where it runs, else 1. All of them must then
            call the loss: pass 1 for a loss that one rank computes for itself.
        use_horovod: Must be False.
        comm: How texts reach the other ranks, ``"gather"`` or ``"ring"``: see :func:`clipfast.ops.contrastive_loss`.
        equal_batches: The promise that all ranks hold equally many rows, which spares an exchange of sizes.
        label_smoothing: The share of every target that is spread evenly over its row, as in
            :func:`torch.nn.functional.cross_entropy`.

    A subclass that overrides :meth:`get_logits` (margins, masks, another similarity) or :meth:`get_ground_truth` gets
    what it says: logits are then materialised, as in open_clip, and cross-entropy is PyTorch's. Such a loss takes
    neither ``groups`` nor extra texts.

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
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool = False,
        *,
        comm: str = "gather",
        equal_batches: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_smoothing(label_smoothing, "ContrastiveLoss(label_smoothing)")
        if use_horovod:
            raise ValueError("ContrastiveLoss(use_horovod): got True, expected False: torch.distributed is used")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        if world_size is not None and world_size > 1:
            self._check_flags()
        self.rank = rank
        self.world_size = world_size
        self.comm = comm
        self.equal_batches = equal_batches
        self.label_smoothing = label_smoothing

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
        *,
        groups: Tensor | None = None,
        extra_text_features: Tensor | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """Compute the loss.

        Args:
            image_features: ``[B, D]``, L2-normalised.
            text_features: ``[B, D]``, L2-normalised.
            logit_scale: A scalar, ``model.logit_scale.exp()``.
            logit_bias: Added to every logit; it cannot change this loss.
            output_dict: Whether to return ``{"contrastive_loss": loss}``.
            groups: Integers ``[B]``; pairs with one id belong together. See :func:`clipfast.ops.contrastive_loss`.
            extra_text_features: ``[M, D]`` texts of no image, against which images are held; see there.

        Returns:
            A scalar, the loss of the batch joined over ranks (or the dict around it).

        Raises:
            TypeError, ValueError: As :func:`clipfast.ops.contrastive_loss`; or a loss with logits or labels of its own
                was given groups or extra texts.
        """
        image_features, text_features, extra_text_features = of_one_dtype(
            image_features, text_features, extra_text_features
        )
        if self._is_customised():
            for name, given in (("groups", groups), ("extra_text_features", extra_text_features)):
                if given is not None:
                    raise ValueError(
                        f"ContrastiveLoss({name}): got some for a loss with logits or labels of its own, expected None"
                    )
            loss = self._plain_loss(image_features, text_features, logit_scale, logit_bias)
            return {"contrastive_loss": loss} if output_dict else loss
        group = self._group()
        loss = ops.contrastive_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias=logit_bias,
            group=group,
            comm=self.comm,
            equal_batches=self.equal_batches,
            label_smoothing=self.label_smoothing,
            groups=groups,
            extra_text_features=extra_text_features,
        )
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits that the loss is of: ``[B, B]`` per image and per text; for subclasses to change.

        The loss itself never forms them, unless a subclass overrides this. On several ranks B counts the rows of all,
        which must hold equally many; with ``local_loss``, they are ``[rows of this rank, B]``.

        Args:
            image_features: ``[rows, D]``.
            text_features: ``[rows, D]``.
            logit_scale: A scalar.
            logit_bias: A scalar or None.
        """
        group = self._group()
        images, texts = image_features, text_features
        if group is not None:
            # gathered with their gradients, whatever the flag: without them the encoders' would be wrong
            images, texts = (torch.cat(dist_nn.all_gather(f.contiguous(), group=group)) for f in (images, texts))
        if group is not None and self.local_loss:
            logits = [logit_scale * image_features @ texts.T, logit_scale * text_features @ images.T]
        else:
            per_image = logit_scale * images @ texts.T
            logits = [per_image, per_image.T]
        return tuple(x if logit_bias is None else x + logit_bias for x in logits)

    def get_ground_truth(self, device: torch.device, num_logits: int) -> Tensor:
        """Return ``[num_logits]``, the column of each row's own pair; for subclasses to change."""
        labels = torch.arange(num_logits, device=device)
        group = self._group()
        return labels if group is None or not self.local_loss else labels + num_logits * dist.get_rank(group)

    def _plain_loss(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
    ) -> Tensor:
        per_image, per_text = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(image_features.device, per_image.shape[0])
        smoothing = self.label_smoothing
        return sum(F.cross_entropy(x, labels, label_smoothing=smoothing) for x in (per_image, per_text)) / 2

    def _is_customised(self) -> bool:
        return self._overrides(ContrastiveLoss, "get_logits", "get_ground_truth")

    def _overrides(self, home: type[nn.Module], *names: str) -> bool:
        """Return whether a method of a class is another one here, by a subclass or on this object alone."""
        return any(n in self.__dict__ or getattr(type(self), n) is not getattr(home, n) for n in names)

    def _group(self) -> dist.ProcessGroup | None:
        group = _process_group("ContrastiveLoss", self.rank, self.world_size)
        if group is not None:
            self._check_flags()
        return group

    def _check_flags(self) -> None:
        if self.local_loss and not self.gather_with_grad:
            raise ValueError(
                "ContrastiveLoss(local_loss=True, gather_with_grad=False): this combination gives wrong gradients on "
                "more than one rank (features of other ranks get none); pass gather_with_grad=True"
            )


class SigLipLoss(nn.Module):
    """SigLIP's sigmoid loss between images and texts; takes the place of open_clip's ``SigLipLoss``.

    Args:
        cache_labels: Accepted as in open_clip; there are no labels to cache.
        rank: As in :class:`ContrastiveLoss`.
        world_size: As in :class:`ContrastiveLoss`.
        dist_impl: Accepted as in open_clip (``bidir``, ``shift``, ``reduce``, ``gather``): all four compute the same.
        comm: As in :class:`ContrastiveLoss`.
        equal_batches: As in :class:`ContrastiveLoss`.

    Raises:
        TypeError: A subclass has a ``get_logits``, as open_clip's loss would call.
        ValueError: ``dist_impl`` is none of these, or a rank or size is not torch.distributed's.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        *,
        comm: str = "gather",
        equal_batches: bool = False,
    ) -> None:
        super().__init__()
        known = ("bidir", "shift", "reduce", "gather")
        if dist_impl is not None and dist_impl not in known:
            raise ValueError(f"SigLipLoss(dist_impl): got {dist_impl!r}, expected one of {', '.join(known)}")
        if getattr(type(self), "get_logits", None) is not None:
            raise TypeError("SigLipLoss: got a subclass with get_logits, expected none: nothing would call it")
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
        image_features, text_features = of_one_dtype(image_features, text_features)
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
