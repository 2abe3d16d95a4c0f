"""Where a process trains: its device, its rank among others, and how ranks agree."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from clipfast.models.open_model import find_device


@dataclass(frozen=True)
class Workplace:
    """A process and the others that train the same model.

    Attributes:
        device: Where this process computes.
        rank: Of this process, 0 to ``world_size`` − 1.
        world_size: How many processes there are.
        group: What they talk through; None for one process alone.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes what only one may write."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; ranks exchange it between CPUs, and no device is waited for."""
        if self.group is None:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return bool(value.item())

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, what: str, work: Callable[[], Any]) -> Any:
        """Do something on every rank; what goes wrong on one is an error on all, and none waits for it.

        Raises:
            RuntimeError: It went wrong on another rank.
            Exception: It went wrong on this one.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        problems = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, problem in enumerate(problems):
            if problem is not None:
                raise RuntimeError(f"{what} failed on rank {rank}: {problem}")
        return result

    def agree(self, what: str, value: Any) -> None:
        """Check that every rank holds the same.

        Raises:
            ValueError: A rank holds something else; on every rank.
        """
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise ValueError(
                    f"{what}: got {_difference(other, values[0])} on rank {rank}, expected what rank 0 has"
                )

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def leave(self) -> None:
        """Say goodbye to the others; what is left is a process alone.

        The group is let go of, so that gloo joins its threads here: one that still held a tensor of the last exchange
        while the interpreter ends would abort the process (seen once in 17 exits on a busy machine).
        """
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group()
        object.__setattr__(self, "group", None)


def _difference(mine: Any, first: Any) -> str:
    if isinstance(mine, dict) and isinstance(first, dict):
        keys = [k for k in mine.keys() | first.keys() if mine.get(k) != first.get(k)]
        return ", ".join(f"{k} = {mine.get(k)!r} and not {first.get(k)!r}" for k in sorted(keys))
    return repr(mine)


def join_workplace(device: str = "auto", *, timeout: float = 600.0) -> Workplace:
    """Join the processes that ``torchrun`` started, or work alone where it did not.

    Args:
        device: As :func:`clipfast.models.open_model.find_device`; each process takes the CUDA device of its local rank.
        timeout: Seconds after which waiting for another rank is an error.

    Raises:
        ValueError: There is no such device.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Workplace(find_device(device))
    rank, world_size, local_rank = (int(os.environ.get(k, "0")) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    found = find_device(device, local_rank)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    if not dist.is_initialized():
        dist.init_process_group(
            # gloo for what ranks agree on beside the tensors of the step
            "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout),
            rank=rank,
            world_size=world_size,
        )
    return Workplace(found, rank, world_size, dist.group.WORLD)
