"""The native code on CPUs with fewer instructions than this one: held back by PyTorch's own setting, and emulated."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.ops import library

pytestmark = [
    pytest.mark.skipif(library.unavailable() is not None, reason=f"no op library: {library.unavailable()}"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="asks for an x86 CPU's instructions"),
]

TESTS = Path(__file__).parent
SAY = (
    "import torch; from clipfast.ops.encoder import native_unable;"
    "print(torch.backends.cpu.get_cpu_capability(), *map(native_unable, (torch.float32, torch.bfloat16)), sep='; ')"
)


def told(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", SAY], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_pytorchs_setting_holds_the_library_back():
    lacks = "this CPU lacks the instructions"
    assert told(ATEN_CPU_CAPABILITY="default") == f"DEFAULT; {lacks} (AVX2); {lacks} (AVX512_BF16)"
    # an x86 CPU without AVX2 is no longer made
    assert told(ATEN_CPU_CAPABILITY="avx2") == f"AVX2; None; {lacks} (AVX512_BF16)"


def test_the_encoder_with_narrower_vectors():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/ops/test_encoder.py"],
        cwd=TESTS.parent,
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"ATEN_CPU_CAPABILITY": "avx2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="no qemu-x86_64 (Debian's qemu-user)")
def test_no_instruction_that_a_haswell_lacks():
    # one that it lacks ends the process: what runs here is every native path, forward and backward
    done = subprocess.run(
        ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c",
         "import torch; from clipfast import self_test\n"
         "results = self_test.run(torch.device('cpu'))\n"
         "assert any(r.op == 'encoder' and r.backend == 'native' for r in results)\n"
         "assert all(r.passed for r in results), results\n"
         "print(torch.backends.cpu.get_cpu_capability())"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == "AVX2", done.stdout + done.stderr[-3000:]
