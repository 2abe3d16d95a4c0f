"""Offsets of the streaming kernels in their compiler's own language: the interpreter's loop indices never overflow."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROBE = """
import re
from triton.backends.compiler import GPUTarget
import triton
from triton.compiler import ASTSource
from clipfast.kernels import attention

for job in attention.aot_jobs():
    if "sm_90 bf16 D=64" not in job.label or "streaming_" not in job.label or "class token" not in job.label:
        continue
    names = job.kernel.arg_names
    source = ASTSource(
        fn=job.kernel,
        signature={n: job.signature.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): value for n, value in job.constexprs.items()},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ttir"]
    assert re.search(r"arith.extsi %token_stride", code), "tokens' offsets are not 64 bits"
    # scalars only: tensors of offsets within a tile are 32 bits by design
    short = re.findall(r"arith.muli .*%token_stride.*: i32", code)
    assert not short, short
    print(job.kernel.__name__)
"""


def test_no_token_offset_is_32_bits(tmp_path: Path) -> None:
    (tmp_path / "probe.py").write_text(PROBE)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, tmp_path / "probe.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["streaming_forward", "streaming_backward_queries", "streaming_backward_keys"]
