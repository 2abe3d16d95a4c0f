"""What a call put off: computed later as it would have been then, or refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clipfast.models.accelerated import Accelerated
from clipfast.modules.inference import uncounted_writes


class Later:
    """Computations of a tower that wait: in the context of now, with the weights of now.

    Args:
        tower: The accelerated tower, which lives as long as this waits.
        twin: What computes in its place; its blocks are ``twin.transformer``.
        just_used: Whether those blocks were all called a moment ago.
    """

    def __init__(self, tower: nn.Module, twin: nn.Module, just_used: bool = False) -> None:
        self._tower, self._twin = tower, twin
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        self._device = next(tower.parameters()).device.type
        self._autocast = torch.is_autocast_enabled(self._device), torch.get_autocast_dtype(self._device)
        self._state = _state_of(tower)
        self._written = uncounted_writes(twin.transformer, just_used)

    def of(self, field: str, compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Return what computes a field of the tower's output later.

        It raises a RuntimeError if the model was changed since.
        """
        return lambda: self._now(field, compute)

    def _now(self, field: str, compute: Callable[[], Tensor]) -> Tensor:
        served = isinstance(self._tower, Accelerated) and self._tower.serving_twin() is self._twin
        if not served or _state_of(self._tower) != self._state or self._written():
            raise RuntimeError(
                f"{field} is computed when it is first read, and the model was changed since the call (its weights, "
                f"device, modules or hooks): read it before, or accelerate the model without this output "
                f"(token_outputs=False)"
            )
        with ExitStack() as contexts:
            contexts.enter_context(torch.inference_mode(self._inference))
            contexts.enter_context(torch.set_grad_enabled(self._grad))
            enabled, dtype = self._autocast
            contexts.enter_context(torch.autocast(self._device, dtype=dtype, enabled=enabled))
            return compute()


def can_wait(tower: nn.Module) -> bool:
    """Return whether a tower's weights will be there later, and tell whether they were written to."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.maybe_current_level() is None
        # FSDP has them during a call only
        and not (dist.is_available() and dist.is_initialized())
        and all(
            # others than Parameters are there for a call only, such as functional_call's
            type(p) is nn.Parameter
            and not p.is_inference()
            and not p.is_meta
            and not (torch.is_grad_enabled() and p.requires_grad)
            for p in tower.parameters()
        )
    )


def _state_of(tower: nn.Module) -> list[tuple[Any, ...]]:
    # two numbers that do not come back: where it lies, and how often PyTorch counted a write
    return [(id(p), p.data_ptr(), p._version) for p in tower.parameters()]
