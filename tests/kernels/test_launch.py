"""Launches of kernels that Triton knows already: shown without a GPU, in a process with a driver of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from clipfast.kernels import launch

SUPPORT = Path(__file__).parents[1] / "support"


def test_launches() -> None:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    left_out = ("PYTEST_", "CLIPFAST_BACKEND", "TRITON_")
    environment = {k: v for k, v in environment.items() if not k.startswith(left_out)}
    plugins = ["-p", "no:cacheprovider", "-p", "mocked_driver"]
    command = [sys.executable, "-m", "pytest", "-q", *plugins, str(SUPPORT / "launch_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # the file was not left out
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20, done.stdout


def test_interpreted_kernels_are_tritons_own() -> None:
    import triton

    if not triton.knobs.runtime.interpret:
        return
    from clipfast.kernels import layer_norm

    assert not isinstance(layer_norm._forward_kernel, launch.Kernel)
