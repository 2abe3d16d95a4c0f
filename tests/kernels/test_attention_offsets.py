"""Offsets of the streaming kernels in their compiler's own language: the interpreter's loop indices never overflow."""

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


def test_no_token_offset_is_32_bits(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, tmp_path / "probe.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["streaming_forward", "streaming_backward_queries", "streaming_backward_keys"]
