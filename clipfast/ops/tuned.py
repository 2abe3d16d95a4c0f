"""What ``clipfast tune`` measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Tuned:
    """The file of one device: for every op and class of calls, the fastest backend."""

    path: Path
    fastest: dict[str, dict[str, str]]


def find(device: torch.device) -> tuple[Tuned | None, str]:
    """Return what was measured on a device, or None, and why."""
    return None, "no tuned file"
