"""CLIP's loss of a small batch on the CPU, whose products stay in memory between the loss and its gradients.

Forming them again is a quarter of the products of a training step: 2·B²·D operations of 8. A large batch has no room
for them, and on a card the tiles are in registers anyway. Up to 4 MB they are read back faster: at B = 1,024 and
D = 512 that is 4 MB in place of 1.1 GFLOP.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clipfast.ops import contrastive_kernels as kernels

MOST = 1 << 20  # logits that are kept


def keeps(image: Tensor, text: Tensor, of: kernels.Kernels, learns: bool) -> bool:
    """Return whether a loss of these features, by these kernels, keeps its products.

    Args:
        image: ``[M, D]``, as the kernels read them.
        text: ``[N, D]``.
        of: The kernels that compute the loss.
        learns: Whether gradients will be asked for.
    """
    return learns and of is kernels.native and image.is_cpu and image.shape[0] * text.shape[0] <= MOST


def _fake_statistics(image: Tensor, text: Tensor, *rest: object) -> tuple[Tensor, ...]:
    found = kernels.fakes["statistics"](image, text, *rest)
    return *found, found[2].new_empty(image.shape[0], text.shape[0])


def _fake_gradients(products: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return kernels.fakes["gradients"](*rest)


if kernels.native is not None:
    statistics = torch.ops.clipfast.contrastive_statistics_and_products
    gradients = torch.ops.clipfast.contrastive_gradients_of_products
    _definitions = torch.library.Library("clipfast", "FRAGMENT")
    torch.library.register_fake(statistics.default.name(), _fake_statistics, lib=_definitions)
    torch.library.register_fake(gradients.default.name(), _fake_gradients, lib=_definitions)
