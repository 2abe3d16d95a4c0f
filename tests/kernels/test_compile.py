"""Every configuration of every kernel compiles as it is launched, within the memory of its card, and is reckoned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfast.kernels import aot, partial_sums

SCRIPT = Path(__file__).parents[2] / "scripts" / "compile_kernels.py"


def compile_kernels(*words: str) -> subprocess.CompletedProcess[str]:
    # a fresh process: kernels of this one are interpreted
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, SCRIPT, *words], env=environment, capture_output=True, text=True, timeout=7200
    )


def test_a_family_in_short() -> None:
    done = compile_kernels("partial_sums", "bf16", "--architectures", "90")
    assert done.returncode == 0, done.stdout + done.stderr
    # one output for GELU's bias, two for LayerNorm's weight and bias, three with its column sums
    assert "3 kernels compiled" in done.stdout
    assert done.stdout.count("% of HBM") == 3
    assert compile_kernels("no such kernel", "--architectures", "90").returncode == 1


@pytest.mark.slow
def test_one_configuration_in_127() -> None:
    # a prime number: neither families nor architectures are passed over in step
    done = compile_kernels("--every", "127")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.exhaustive
def test_every_configuration() -> None:
    done = compile_kernels()
    assert done.returncode == 0, done.stdout + done.stderr


# launchers run with tensors of their own, in memory and of other lengths, up to where Triton would compile: the same
LAUNCHED = """
import dataclasses
import torch, triton
from triton.backends.compiler import GPUTarget
from clipfast.kernels import aot, attention, bias_gelu, layer_norm

compiled = []

class Kernel:
    function = packed_metadata = None
    def launch_metadata(self, *_): return None
    def run(self, *_): pass

def compile(source, target, options):
    compiled.append((source.name, source.hash(), target, options))
    return Kernel()

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

real, triton.compiler.compile = triton.compiler.compile, compile
triton.runtime.driver.set_active(Driver())
bf16, fp32 = torch.bfloat16, torch.float32

def rows(dtype, *shape): return torch.empty(*shape, dtype=dtype)

weight, bias = rows(fp32, 768), rows(fp32, 768)
x, stream = rows(bf16, 5, 768), rows(fp32, 5, 768)
y, total, mean, rstd = layer_norm.add_forward(x, stream, weight, bias, 1e-6)
layer_norm.add_backward(y, total, total.clone(), weight, mean, rstd, bf16, fp32, fp32)
hidden = rows(bf16, 5, 3072)
bias_gelu.forward(hidden, None, "tanh")
bias_gelu.backward(hidden, hidden.clone(), rows(fp32, 3072), "none")
qkv = rows(bf16, 16, 197, 3, 12, 64)
out, lse = attention.forward(qkv, None, False, 0.2)
attention.backward(out.clone(), qkv, out, lse, None, False, 0.2)

expected = [
    job
    for call in (
        layer_norm.aot_call(512, 768, True, "bf16", "fp32", "fp32", sums=True),
        bias_gelu.aot_call(512, 3072, "tanh", "bf16", None),
        bias_gelu.aot_call(512, 3072, "none", "bf16", "fp32"),
        attention.aot_call(64, 197, 12, 64, "bf16", False),
    )
    for job in aot.capture(call, 90)
]
backend = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))
known = {job.source().hash(): job for job in expected}
assert len(compiled) == 8, len(compiled)
for name, source, target, options in compiled:
    assert source in known, f"{name} is launched otherwise"
    job = known[source]
    assert target == GPUTarget("cuda", 90, 32)
    assert backend.parse_options(job.options()).hash() == backend.parse_options(options).hash(), job.label

# nothing is left behind: what is launched now is compiled again by Triton's own path
before = len(compiled)
bias_gelu.forward(rows(bf16, 5, 1000), None, "tanh")
assert len(compiled) == before + 1

# an integer that is 1 is a constant, one that divides by 16 says so, one that must not be looked at does not
forward = expected[0]
assert forward.attributes["x"] == forward.attributes["width"] == [["tt.divisibility", 16]]
assert not forward.attributes.get("rows") and forward.signature["rows"] == "i32"
(narrow, *_) = aot.capture(layer_norm.aot_call(512, 1, False, "bf16", "bf16", "bf16"), 90)
assert narrow.constexprs["width"] == 1 and "width" not in narrow.signature
print("the same")
"""

# what the machine code must tell
PROBE = """
import dataclasses
from clipfast.benchmark.reckoning import report
from clipfast.benchmark.reckoning.launches import reckon_job
from clipfast.kernels import aot, attention, partial_sums

job = aot.capture(attention.aot_call(256, 50, 12, 64, "bf16", False), 90)[0]
found = reckon_job(job)
assert job.needs_hgmma and found.hgmma and not report.problems(found), report.problems(found)
without = dataclasses.replace(found, hgmma=0)
assert report.problems(without) == ["no HGMMA"]
assert "bytes of shared memory" in report.problems(dataclasses.replace(found, shared_memory=227 * 1024 + 1))[0]
cost = dataclasses.replace(found.cost, spilled=0.04 * found.cost.clocks[found.cost.binding])
assert not report.problems(dataclasses.replace(found, spills=9, cost=cost))
cost = dataclasses.replace(found.cost, spilled=0.06 * found.cost.clocks[found.cost.binding])
assert "9 spills take" in report.problems(dataclasses.replace(found, spills=9, cost=cost))[0]
try:
    dataclasses.replace(job, signature={}).compile()
except ValueError as error:
    assert "qkv" in str(error)
else:
    raise AssertionError("an incomplete signature passed")
families = aot.discover((80, 90))
assert {"bias_gelu", "layer_norm", "partial_sums", "attention_whole", "attention_streaming"} <= families.keys()
labels = [(job.label, job.architecture) for jobs in families.values() for job in jobs]
assert len(labels) == len(set(labels)), "two jobs have one label"
for jobs in families.values():
    for job in jobs:
        assert job.work().parts.keys() <= job.sizes.keys() and job.bytes_moved() > 0, job.label
"""


@pytest.mark.parametrize("script", [LAUNCHED, PROBE], ids=["as launched", "problems"])
def test_in_a_process_of_its_own(script: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # the kernels' sources are read from a file
    (tmp_path / "probe.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "probe.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_interpreted_kernels_are_not_compiled() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton is not interpreted")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.capture(next(iter(partial_sums.aot_calls())), 90)
