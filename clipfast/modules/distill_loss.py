"""CLIP's loss with a teacher's, as a module with open_clip's arguments and call."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clipfast import ops
from clipfast.modules.loss import ContrastiveLoss, of_one_dtype


class DistillClipLoss(ContrastiveLoss):
    """A student's contrastive loss and its cross-entropy with a teacher; takes the place of open_clip's class.

    The arguments are those of :class:`ContrastiveLoss`, but for ``label_smoothing``. No B×B matrix is held. Gradients
    after DDP's mean are those of one process with the joined batch.

    A subclass that overrides :meth:`get_logits`, :meth:`get_ground_truth` or :meth:`dist_loss` gets what it says:
    logits of both models are then materialised, as in open_clip.

    Source: open_clip's ``DistillClipLoss``; Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
    """

    # twice: open_clip's arguments, without the label smoothing that the contrastive loss alone knows
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
    ) -> None:
        super().__init__(
            local_loss,
            gather_with_grad,
            cache_labels,
            rank,
            world_size,
            use_horovod,
            comm=comm,
            equal_batches=equal_batches,
        )

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Tensor | float,
        output_dict: bool = False,
    ) -> tuple[Tensor, Tensor] | dict[str, Tensor]:
        """Compute both losses; training adds them up, with weights of its choice.

        Args:
            image_features: ``[B, D]``, L2-normalised.
            text_features: ``[B, D]``, L2-normalised.
            logit_scale: A scalar, ``model.logit_scale.exp()``.
            dist_image_features: The teacher's ``[B, E]``, L2-normalised, made under ``torch.no_grad()``.
            dist_text_features: The teacher's ``[B, E]``.
            dist_logit_scale: The teacher's scalar.
            output_dict: Whether to return ``{"contrastive_loss": ..., "distill_loss": ...}``.

        Returns:
            The contrastive loss and the distillation loss, scalars of the batch joined over ranks (or the dict).

        Raises:
            TypeError, ValueError: As :func:`clipfast.ops.distillation_loss`.
        """
        image_features, text_features = of_one_dtype(image_features, text_features)
        dist_image_features, dist_text_features = of_one_dtype(dist_image_features, dist_text_features)
        student = (image_features, text_features, logit_scale)
        teacher = (dist_image_features, dist_text_features, dist_logit_scale)
        if self._is_customised() or self._overrides(DistillClipLoss, "dist_loss"):
            contrastive = self._plain_loss(*student, None)
            pairs = zip(self.get_logits(*teacher), self.get_logits(*student), strict=True)
            distill = sum(self.dist_loss(of_teacher, of_student) for of_teacher, of_student in pairs) / 2
        else:
            contrastive, distill = ops.distillation_loss(
                *student, *teacher, group=self._group(), comm=self.comm, equal_batches=self.equal_batches
            )
        if output_dict:
            return {"contrastive_loss": contrastive, "distill_loss": distill}
        return contrastive, distill

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """Return the mean cross-entropy of rows ``[B, N]`` with a teacher's; for subclasses to change."""
        return F.cross_entropy(student_logits, teacher_logits.softmax(1))
