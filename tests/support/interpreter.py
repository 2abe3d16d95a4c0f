"""How tests run Triton kernels: on the GPU where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def enable() -> None:
    """Let Triton interpret kernels on a machine without a GPU, where it could not run them at all.

    Triton decides when it is imported, and other libraries import it: this comes before all of them. Nothing else in
    the process notices. What PyTorch compiles for the CPU is C++.
    """
    if DEVICE == "cpu" and "triton" not in sys.modules:
        os.environ["TRITON_INTERPRET"] = "1"


def prepare() -> None:
    """Import Triton as :func:`enable` wants it, with the interpreter's products of bfloat16 repaired."""
    enable()
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if DEVICE == "cpu":
        assert isinstance(tl.sum, InterpretedFunction), "something imported Triton before interpreter.enable()"
        _repair_bfloat16_products()


def leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Triton's kernels out of a test, which the interpreter makes slow: on a CPU they are refused then.

    A kernel is interpreted or not as it was when its file was imported. So all are imported before the environment
    changes: those that the test imports would fail in every test that comes after it in the process.
    """
    if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
        prepare()
        for family in ("attention", "layer_norm", "bias_gelu"):
            importlib.import_module(f"clipfast.kernels.{family}")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def _repair_bfloat16_products() -> None:
    """Make ``tl.dot`` right for bfloat16, which the interpreter keeps as 16-bit integers and multiplies as such."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    if hasattr(InterpreterBuilder, "unrepaired_create_dot"):
        return
    InterpreterBuilder.unrepaired_create_dot = InterpreterBuilder.create_dot

    def values(handle: TensorHandle) -> np.ndarray:
        if handle.dtype.scalar != tl.bfloat16:
            return handle.data.astype(np.float32)
        # bfloat16 is the upper half of float32
        return (handle.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: object):
        if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
            return self.unrepaired_create_dot(a, b, d, *rest)
        return TensorHandle(np.matmul(values(a), values(b)).astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
