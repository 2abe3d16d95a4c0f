"""The choice of an implementation: forced, explained, and announced where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import pytest
import torch

import clipfast
from clipfast import ops
from clipfast.ops import dispatch

QKV = torch.zeros(1, 4, 48)


@pytest.fixture(autouse=True)
def _nothing_announced_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_announced", set())


def test_explain_names_the_implementation_and_its_rivals() -> None:
    text = clipfast.explain("attention", QKV, 2)
    assert text.splitlines()[0] == "attention: torch (scaled_dot_product_attention)"
    assert "not reference" in text
    with clipfast.backend("reference"):
        text = clipfast.explain("attention", QKV, 2)
    assert text.startswith("attention: reference")
    assert "the reference backend was asked for" in text


def test_explain_gives_the_reason() -> None:
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    text = clipfast.explain("attention", QKV[0], 2, cu_seqlens=offsets)
    assert text.startswith("attention: reference")
    assert "not torch (scaled_dot_product_attention): packed sequences" in text


def test_explain_checks_the_call() -> None:
    with pytest.raises(ValueError, match=r"got 'conv', expected one of .*'attention'"):
        clipfast.explain("conv")
    with pytest.raises(ValueError, match="expected"):
        clipfast.explain("attention", QKV, 7)


def test_a_backend_that_is_not_there_is_announced_once() -> None:
    expected = ops.attention(QKV, 2)
    with clipfast.backend("native"):
        with pytest.warns(ops.FallbackWarning, match="attention does not use the native backend.*no native"):
            assert torch.equal(ops.attention(QKV, 2), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.attention(QKV, 2)


def test_a_refused_call_is_announced_with_its_reason() -> None:
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    with clipfast.backend("torch"), pytest.warns(ops.FallbackWarning, match="packed sequences"):
        ops.attention(QKV[0], 2, cu_seqlens=offsets)


def test_the_backend_is_restored() -> None:
    with pytest.raises(RuntimeError, match="inside"), clipfast.backend("reference"):
        raise RuntimeError("inside")
    assert clipfast.explain("attention", QKV, 2).startswith("attention: torch")
    with pytest.raises(ValueError, match="got 'cuda', expected one of 'auto'"), clipfast.backend("cuda"):
        pass


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_environment_variable() -> None:
    code = "import clipfast, torch; print(clipfast.explain('attention', torch.zeros(1, 4, 48), 2))"
    assert run_python(code, CLIPFAST_BACKEND="reference").stdout.startswith("attention: reference")
    wrong = run_python(code, CLIPFAST_BACKEND="fast")
    assert "CLIPFAST_BACKEND: got 'fast', expected one of 'auto'" in wrong.stderr


@pytest.mark.parametrize(
    "statement",
    ["from clipfast.ops import attention", "import clipfast.ops.attention; attention = clipfast.ops.attention"],
)
def test_ops_are_functions_however_they_are_imported(statement: str) -> None:
    code = f"{statement}\nimport clipfast, clipfast.ops.attention\nassert callable(attention), attention"
    code += "\nassert callable(clipfast.ops.attention) and callable(clipfast.ops.layer_norm)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr
