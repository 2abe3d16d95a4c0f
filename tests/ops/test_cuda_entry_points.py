"""How the op library finds what lies in libtorch_cuda, and what is said where it does not.

`make test-cuda-build` runs this file against CUDA builds of PyTorch. On a build without CUDA a small library of that
name, loaded as Python loads PyTorch, stands in for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from clipfast import doctor, doctor_report, ops
from clipfast.ops import dispatch, library

STREAM = "aoti_torch_get_current_cuda_stream"
pytestmark = pytest.mark.skipif(library.unavailable() is not None, reason=str(library.unavailable()))
with_cuda = pytest.mark.skipif(torch.version.cuda is None, reason="a PyTorch without CUDA")
without_cuda = pytest.mark.skipif(torch.version.cuda is not None, reason="a PyTorch with CUDA")
of_cuda = pytest.mark.skipif(
    library.unavailable() is None and library.build_info()["cuda"] == "none", reason="a library without CUDA"
)


@of_cuda
@pytest.mark.parametrize(
    ("exported", "expected"), [(STREAM, None), ("nothing_of_use", f"PyTorch's libtorch_cuda.so has no {STREAM}")]
)
@without_cuda
def test_it_looks_into_a_library_that_others_cannot_see(exported: str, expected: str | None, tmp_path: Path) -> None:
    compiler = next((c for c in (os.environ.get("CC", "gcc"), "cc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler")
    source, stand_in = tmp_path / "cuda.c", tmp_path / "stand_in.so"
    source.write_text(f"int {exported}(int device, void** stream) {{ *stream = (void*)0; return 0; }}\n")
    # found by the name inside it, as PyTorch's is, and not by that of a file
    named = "-Wl,-soname,libtorch_cuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", named, "-o", stand_in, source], check=True)
    code = f"import ctypes; ctypes.CDLL({str(stand_in)!r}, mode=ctypes.RTLD_LOCAL); import sys; "
    code += "from clipfast.ops import library; print(library.missing_cuda_entry_points())"
    # where this process has found the package, and not in the clone's root
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr


@of_cuda
@without_cuda
def test_a_pytorch_without_cuda_has_none() -> None:
    reason = library.missing_cuda_entry_points()
    assert reason == "this process holds no libtorch_cuda.so: its PyTorch was built without CUDA"


def test_no_library_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "unavailable", lambda: "the op library was not built")
    assert library.missing_cuda_entry_points() == "the op library was not built"


@of_cuda
@with_cuda
def test_a_build_with_cuda_has_all_of_them() -> None:
    assert library.missing_cuda_entry_points() is None


class Calls(TorchDispatchMode):
    """The names of our operators that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "clipfast":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def on_a_card(monkeypatch: pytest.MonkeyPatch, loss: str, compute: bool) -> str:
    """Return who serves a loss of fake tensors on an H100 that is not there, after a computation if it can be had."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    with FakeTensorMode(), Calls() as calls:
        image, text = (torch.empty(8, 16, device="cuda") for _ in range(2))
        chosen = dispatch.chosen(loss, image, text, 10.0)
        if compute:
            assert getattr(ops, loss)(image, text, 10.0).device.type == "cuda"
            statistics = {"contrastive_loss": "contrastive_statistics", "siglip_loss": "siglip_statistics"}[loss]
            assert calls.names == [statistics + ("_on_card" if chosen == "native" else "_chunked")]
    return chosen


@of_cuda
@pytest.mark.parametrize("loss", ["contrastive_loss", "siglip_loss"])
def test_losses_go_to_the_library_where_it_found_them(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    has_cuda = torch.version.cuda is not None
    if not has_cuda:
        monkeypatch.setattr(library, "missing_cuda_entry_points", lambda: None)
    # without CUDA, PyTorch does not even index a fake tensor of a card
    assert on_a_card(monkeypatch, loss, compute=has_cuda) == "native"
    monkeypatch.setattr(library, "missing_cuda_entry_points", lambda: f"no stream was found for {loss}")
    with pytest.warns(dispatch.FallbackWarning, match="no stream was found") if has_cuda else nullcontext():
        assert on_a_card(monkeypatch, loss, compute=has_cuda) == "torch"


@pytest.mark.parametrize("reason", [None, "no stream was found"])
def test_the_doctor_has_a_line_for_them(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing_cuda_entry_points", lambda: reason)
    problems: list = []
    report = doctor.basics() | {"library": doctor._library(problems, wants_cuda=True), "cards": []}
    report |= {
        "tuned": {},
        "triton": {"version": None, "reason": "not installed"},
        "torch": {"version": "2.11.0", "cuda": "13.0"},
    }
    expected = "found" if reason is None else "missing (no stream was found)"
    assert f"CUDA entry points: {expected}" in doctor_report.render(report).splitlines()
    has_cuda = library.build_info()["cuda"] != "none"
    assert [level for level, _ in problems] == (["warning"] if reason and has_cuda else [])
    # a PyTorch without CUDA has no use for them
    report["torch"]["cuda"] = None
    assert "CUDA entry points" not in doctor_report.render(report)
