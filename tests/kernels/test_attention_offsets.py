"""What only the compiler shows of attention's kernels: the width of offsets, and how many kernels serve all batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import re
from clipfast.kernels import aot, attention

for call in attention.aot_calls():
    if call.label != "attention bf16 D=64, 577 tokens":
        continue
    for job in aot.capture(call, 90):
        assert job.constexprs["CLASS_TOKEN"]
        code = job.compile().asm["ttir"]
        # units of 8 elements to elements: a launcher sees that they stay below 2^22
        ((line, stride),) = re.findall(r"((%\\S+) = arith.muli %token_stride, %c8_i32\\S* : i32)", code)
        code = code.replace(line, "")
        assert re.search(rf"arith.extsi {stride}\\b", code), "tokens' offsets are not 64 bits"
        # scalars only: tensors of offsets within a tile are 32 bits by design
        short = re.findall(rf"arith.muli .*(?:%token_stride|{stride})\\b.*: i32", code)
        assert not short, short
        print(job.name)
"""


SPECIALISATIONS = """
from clipfast.kernels import aot, attention

def kernels(*calls):
    jobs = [job for call in calls for job in aot.capture(call, 90)]
    return sorted(kernel.partition(" ")[0].rpartition(".")[2] for kernel in {aot.specialisation(job) for job in jobs})

# one head, one sequence, lengths and strides that are multiples of 16 and that are not
shapes = [(1, 1), (1, 16), (2, 12), (3, 7), (256, 12)]
for tokens in ((33, 48, 50, 64), (600, 608, 1000), (None,)):
    calls = [attention.aot_call(b, n, h, 104, "bf16", True) for b, h in shapes for n in tokens]
    print(*kernels(*calls))
print(*kernels(*(attention.aot_call(b, 50, h, 64, "bf16", False, sign) for b, h in shapes for sign in (-1, 0, 1))))
"""


def compiler(source: str, tmp_path: Path) -> list[str]:
    """Run a script where Triton compiles, and return the lines that it printed."""
    (tmp_path / "probe.py").write_text(source)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, tmp_path / "probe.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_no_token_offset_is_32_bits(tmp_path: Path) -> None:
    names = ["streaming_forward", "streaming_backward_queries", "streaming_backward_keys"]
    assert compiler(PROBE, tmp_path) == names


def test_one_kernel_serves_every_batch(tmp_path: Path) -> None:
    streaming = "streaming_backward_keys streaming_backward_queries streaming_forward"
    # the forward pass is compiled for each sign of the scale, the backward pass is not
    signs = "whole_backward whole_forward whole_forward whole_forward"
    assert compiler(SPECIALISATIONS, tmp_path) == ["whole_backward whole_forward", streaming, streaming, signs]
