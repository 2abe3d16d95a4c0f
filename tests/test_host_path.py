"""The host never waits for a card between the first layer and the last, forward or backward, nor where nobody looked.

Shown without a GPU on a card of Python's own (``tests/support/pretend_card.py``), in processes of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.utils.backend_registration

SUPPORT = Path(__file__).parent / "support"
TESTS = ("host_path_cases.py", "host_path_planted.py", "host_path_training.py")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="PyTorch has no backends written in Python before 2.10",
)
def test_host_path() -> None:
    # a GPU would be the accelerator in its place
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {k: v for k, v in environment.items() if not k.startswith(("PYTEST_", "CLIPFAST_BACKEND"))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "host_path", *(str(SUPPORT / tests) for tests in TESTS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # no file was left out
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100, done.stdout
