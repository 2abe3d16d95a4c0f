"""What a call put off: computed later as it would have been then, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfast.models.accelerated import Accelerated
from clipfast.models.twins import TwinText
from clipfast.modules.inference import uncounted_writes


class Later:
    """A computation of a tower that waits: in the context of now, with the weights of now.

    Args:
        tower: The accelerated tower, which lives as long as this waits.
        twin: What computes in its place.
        compute: The computation.
    """

    def __init__(self, tower: nn.Module, twin: TwinText, compute: Callable[[], Tensor]) -> None:
        self._tower, self._twin, self._compute = tower, twin, compute
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._device = next(tower.parameters()).device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self._state = _state_of(tower)
        self._written = uncounted_writes(twin.transformer)

    def __call__(self) -> Tensor:
        """Return what was put off.

        Raises:
            RuntimeError: The model was changed since.
        """
        served = isinstance(self._tower, Accelerated) and self._tower.serving_twin() is self._twin
        if not served or _state_of(self._tower) != self._state or self._written():
            raise RuntimeError(
                "last_hidden_state is computed when it is first read, and the model was changed since the call (its "
                "weights, device, modules or hooks): read it before, or accelerate the model without this output "
                "(token_outputs=False)"
            )
        with ExitStack() as contexts:
            contexts.enter_context(torch.inference_mode(self._inference))
            contexts.enter_context(torch.set_grad_enabled(self._grad))
            enabled, dtype = self._autocast
            contexts.enter_context(torch.autocast(self._device, dtype=dtype, enabled=enabled))
            return self._compute()


def can_wait(tower: nn.Module) -> bool:
    """Return whether a tower's weights will be there later, and tell whether they were written to."""
    # FSDP has them during a call only
    return not (dist.is_available() and dist.is_initialized()) and all(
        type(p) in (nn.Parameter, Tensor)
        and not p.is_inference()
        and not p.is_meta
        and not (torch.is_grad_enabled() and p.requires_grad)
        for p in tower.parameters()
    )


def _state_of(tower: nn.Module) -> list[tuple[Any, ...]]:
    # two numbers that do not come back: where it lies, and how often PyTorch counted a write
    return [(id(p), p.data_ptr(), p._version) for p in tower.parameters()]
