"""How the threads of a command wait for one another.

Between two parallel loops OpenMP's threads spin, so that the next loop starts at once. A thread that spins keeps a core
from any other process. Where that process holds the core of the last thread to arrive, all others spin for nothing.
GNU's OpenMP, which PyTorch ships on Linux, spins for a long while before a thread sleeps: with one other busy process
on a machine of two cores training is seven times slower (docs/training.md). A shorter wait costs little where the
machine is idle.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

# What a user sets to say how threads wait: GNU's names, the standard's, and those of Intel's and LLVM's OpenMP
_OF_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
SPINS = 20_000  # the fastest of the three that were tried beside another process, and the nearest to the default alone


def spin_briefly(environment: MutableMapping[str, str] | None = None) -> bool:
    """Let OpenMP's threads sleep soon after they have nothing to do. Call it before PyTorch is imported.

    OpenMP reads its settings when it is loaded, so this is for programs alone: a library leaves them to the program
    that imports it. Child processes inherit the setting.

    Args:
        environment: Where settings are read and written; the process' own by default.

    Returns:
        Whether the setting was made. What a user has set stays, and so does what PyTorch has read.
    """
    environment = os.environ if environment is None else environment
    if "torch" in sys.modules or any(name in environment for name in _OF_THE_USER):
        return False
    environment["GOMP_SPINCOUNT"] = str(SPINS)
    return True
