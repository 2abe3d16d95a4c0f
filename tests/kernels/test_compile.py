"""Every configuration of every kernel compiles for three architectures, without spills and within their memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.kernels import aot

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"


def compile_kernels(*words: str) -> subprocess.CompletedProcess[str]:
    # a fresh process: kernels of this one are interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=7200
    )


def test_every_kernel_family_is_found() -> None:
    families = aot.discover()
    assert {"bias_gelu", "layer_norm", "partial_sums"} <= families.keys()
    labels = [job.label for jobs in families.values() for job in jobs]
    assert len(labels) == len(set(labels))


def test_a_family_in_short() -> None:
    done = compile_kernels("partial_sums", "to bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kernels compiled" in done.stdout
    assert compile_kernels("no such kernel").returncode == 1


@pytest.mark.slow
def test_one_configuration_in_thirty_one() -> None:
    # a prime number: neither families nor architectures are passed over in step
    done = compile_kernels("--every", "31")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive
def test_every_configuration() -> None:
    done = compile_kernels()
    assert done.returncode == 0, done.stdout + done.stderr


# what the machine code must tell: tensor-core instructions where there is a product, and none where there is none
PROBE = """
import dataclasses
import triton, triton.language as tl
from clipfast.kernels import aot

@triton.jit
def product(x, y, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    a = tl.load(x + rows * N + columns)
    b = tl.load(y + rows * N + columns)
    tl.store(y + rows * N + columns, tl.dot(a, b).to(tl.float16))

def job(**changes):
    size = changes.pop("size")
    return aot.AotJob(product, {"x": "*fp16", "y": "*fp16"}, {"N": size}, 4, 1, "probe", **changes)

assert aot.compile_job(job(size=64), 80).hmma
small = aot.compile_job(job(size=64, needs_hgmma=True), 90)
assert small.hgmma and not small.problems, small
copied = aot.discover()["partial_sums"][0]
assert aot.compile_job(dataclasses.replace(copied, needs_hgmma=True), 90).problems == ("no HGMMA",)
try:
    aot.compile_job(dataclasses.replace(copied, signature={}), 90)
except ValueError as error:
    assert "partials" in str(error)
else:
    raise AssertionError("an incomplete signature passed")
"""


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    (tmp_path / "probe.py").write_text(PROBE)
    done = subprocess.run(
        [sys.executable, tmp_path / "probe.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_problems() -> None:
    job = next(job for job in aot.discover()["partial_sums"])
    good = {"spills": 0, "shared_memory": 163 * 1024, "hmma": 0, "hgmma": 0, "tcgen05": 0}
    assert aot._problems(job, 80, good) == ()
    assert aot._problems(job, 90, good | {"spills": 2}) == ("2 spills",)
    assert "bytes of shared memory" in aot._problems(job, 80, good | {"shared_memory": 163 * 1024 + 1})[0]
    assert "bytes of shared memory" in aot._problems(job, 90, good | {"shared_memory": 227 * 1024 + 1})[0]


def test_interpreted_kernels_are_not_compiled() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton is not interpreted")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_job(aot.discover()["partial_sums"][0], 90)
