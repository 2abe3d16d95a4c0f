"""One plan of kernels for all ranks of a run, and its hash, by which two runs are known to compute alike."""

from __future__ import annotations

from clipfast.ops import plan
from clipfast.train.workplace import Workplace


def share_plan(workplace: Workplace) -> str:
    """Let every rank choose kernels as rank 0 does, without those that failed a check on any rank; return the hash.

    Ranks that measured apart, or that a driver treats differently, would otherwise compute one step with different
    kernels. Call it again when more kernels have been checked. Nothing changes for a process alone.

    Args:
        workplace: The ranks, all of which call this.

    Returns:
        :func:`clipfast.ops.plan.digest`, the same on every rank.

    Raises:
        ValueError: A rank has a clipfast with other rules; on every rank.
    """
    if workplace.group is not None:
        # what is as it was changes nothing: a new plan compiles anew
        merged = plan.merge(workplace.gather(plan.export(workplace.device)))
        if merged != plan.export(workplace.device):
            plan.adopt(merged)
    return plan.digest(workplace.device)


def leave_plan() -> None:
    """Choose kernels as this process itself does."""
    plan.reset()
