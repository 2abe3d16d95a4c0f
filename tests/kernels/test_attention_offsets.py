"""Offsets of the streaming kernels in their compiler's own language: the interpreter's loop indices never overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import re
from clipfast.kernels import aot, attention

# 577 tokens are a class token beside nine tiles
for job in aot.capture(attention.aot_call(256, 577, 12, 64, "bf16", False), 90):
    code = job.compile().asm["ttir"]
    assert re.search(r"arith.extsi %token_stride", code), "tokens' offsets are not 64 bits"
    # scalars only: tensors of offsets within a tile are 32 bits by design
    short = re.findall(r"arith.muli .*%token_stride.*: i32", code)
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
