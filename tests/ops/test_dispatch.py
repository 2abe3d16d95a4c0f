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
from clipfast.ops import dispatch, measured

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
    assert text.startswith("attention: torch")
    assert "not triton (packed queries, keys and values in place): head_dim 8 is not served" in text
    assert "not reference (explicit softmax in plain PyTorch): the rule takes torch" in text


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
    with clipfast.backend("triton"), pytest.warns(ops.FallbackWarning, match="head_dim 8 is not served"):
        ops.attention(QKV, 2)


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


@pytest.fixture
def measured_op(monkeypatch: pytest.MonkeyPatch) -> str:
    """An op whose first implementation must be measured before auto takes it."""
    monkeypatch.setattr(dispatch, "_ops", dict(dispatch._ops))
    dispatch.register(
        "double",
        lambda x: (x,),
        dispatch.Implementation(
            "triton", "kernel", lambda x: 2 * x, lambda x: "odd" if len(x) % 2 else None, measured=True
        ),
        dispatch.Implementation("reference", "sum", lambda x: x + x),
        shape_class=lambda x: "short" if len(x) < 10 else "long",
    )
    return "double"


def card(**fastest: str) -> dict[str, measured.Measurements]:
    return {"cpu": measured.Measurements("2.0", "3.0", "abc", {"double": fastest})}


def test_auto_takes_nothing_that_was_not_measured(measured_op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CARDS", {})
    x = torch.zeros(2)
    assert dispatch.chosen(measured_op, x) == "reference"
    assert "not triton (kernel): no measurement for cpu" in clipfast.explain(measured_op, x)
    with clipfast.backend("triton"):
        assert dispatch.chosen(measured_op, x) == "triton"


def test_auto_goes_by_the_measurements(measured_op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "CARDS", card(short="triton", long="reference"))
    assert dispatch.shape_class(measured_op, torch.zeros(2)) == "short"
    assert dispatch.chosen(measured_op, torch.zeros(2)) == "triton"
    assert dispatch.chosen(measured_op, torch.zeros(20)) == "reference"
    assert "reference was faster on cpu for long" in clipfast.explain(measured_op, torch.zeros(20))
    assert dispatch.chosen(measured_op, torch.zeros(3)) == "reference"
    assert "not triton (kernel): odd" in clipfast.explain(measured_op, torch.zeros(3))
    monkeypatch.setattr(measured, "CARDS", card(short="triton"))
    assert "no measurement for cpu of long" in clipfast.explain(measured_op, torch.zeros(20))


def test_the_measurements_name_ops_and_backends_that_exist() -> None:
    for measurements in measured.CARDS.values():
        for op, fastest in measurements.fastest.items():
            backends = {i.backend for i in dispatch._ops[op].implementations}
            assert set(fastest.values()) <= backends


def test_shape_classes_of_the_ops() -> None:
    x, one = torch.zeros(5000, 768), torch.ones(768)
    assert dispatch.shape_class("layer_norm", x, one, one) == "float32, width ≤ 1024, many rows"
    assert dispatch.shape_class("bias_gelu", x[:4].half(), None, "quick") == "quick, float16, width ≤ 1024, few rows"


def test_a_forced_backend_without_its_hardware_says_so() -> None:
    code = """
import clipfast, torch
with clipfast.backend("triton"):
    print(clipfast.explain("layer_norm", torch.zeros(2, 8), torch.ones(8), torch.ones(8)))
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.stdout.startswith("layer_norm: reference"), done.stderr
    assert "on the CPU only with TRITON_INTERPRET=1" in done.stdout or "Triton is not installed" in done.stdout


def test_triton_is_not_imported_before_a_kernel_runs() -> None:
    code = """
import sys
import clipfast, torch
from clipfast import ops
x = torch.zeros(2, 8)
ops.layer_norm(x, x[0], x[0]), ops.bias_gelu(x), clipfast.explain("bias_gelu", x)
print("triton" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"
