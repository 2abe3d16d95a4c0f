"""Kernels are checked on a card before they serve. Here the interpreter's CPU stands for the card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing import fresh_failures, let_fail  # noqa: F401  # a fixture
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.runtime.errors import OutOfResources

import clipfast
from clipfast import ops
from clipfast.ops import attention_triton, bias_gelu, capturing, fallback, kernel_ops, layer_norm_triton, trust
from clipfast.ops.fallback import KernelFallbackWarning, NotReady

pytestmark = pytest.mark.usefixtures("fresh_failures", "triton_backend")

CPU = torch.device("cpu")
_gelu_trial = bias_gelu.__globals__["_trial"]  # the name is the function's, and not that of its file


def norm_trial(backward: bool, add: bool = False, total: torch.dtype | None = None) -> trust.Trial:
    return layer_norm_triton._trial(CPU, 24, *[torch.float32] * 3, add=add, backward=backward, total=total)


def gelu_trial(backward: bool, bias: bool = True) -> trust.Trial:
    x = torch.empty(3, 40)
    return _gelu_trial(x, x[0] if bias else None, "tanh", backward=backward)


def attention_trial(backward: bool, packed: bool = False) -> trust.Trial:
    qkv = torch.empty(*((40,) if packed else (2, 17)), 3, 2, 32)
    offsets = torch.tensor([0, 40]) if packed else None
    return attention_triton._trials(qkv, offsets, True, 0.2, backward=backward)[-1]


TRIALS: dict[str, Callable[[], trust.Trial]] = {
    "layer_norm forward": lambda: norm_trial(False),
    "layer_norm backward": lambda: norm_trial(True),
    "add_layer_norm forward": lambda: norm_trial(False, add=True),
    "add_layer_norm backward": lambda: norm_trial(True, add=True),
    "add_layer_norm backward, sums": lambda: norm_trial(True, add=True, total=torch.float32),
    "bias_gelu forward": lambda: gelu_trial(False),
    "bias_gelu backward": lambda: gelu_trial(True),
    "bias_gelu backward, no bias": lambda: gelu_trial(True, bias=False),
    "attention forward": lambda: attention_trial(False),
    "attention backward": lambda: attention_trial(True),
    "attention forward, packed": lambda: attention_trial(False, packed=True),
    "attention backward, packed": lambda: attention_trial(True, packed=True),
}


@pytest.fixture(autouse=True)
def _few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "LAUNCHES", 2)
    monkeypatch.setattr(trust, "PROGRAMS", 2)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Let kernels on the CPU need checks, with a cache folder of the test's own."""
    monkeypatch.setattr(trust, "is_required", lambda device: True)
    monkeypatch.setattr(trust, "_cache_folder", lambda: tmp_path)
    return tmp_path


def edit(monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Tensor], int], list[Tensor]]) -> list[int]:
    """Change what every kernel returns; ``change`` gets the results and the number of the launch."""
    real, launches = kernel_ops.kernel, []

    def kernel(family: str, function: str) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            launches.append(1)
            found = real(family, function)(*arguments)
            if isinstance(found, Tensor):
                return change([found], len(launches))[0]
            return tuple(change(list(found), len(launches)))

        return run

    kernel.cache_clear = lambda: None
    monkeypatch.setattr(kernel_ops, "kernel", kernel)
    return launches


@pytest.mark.parametrize("name", TRIALS)
def test_right_kernels_pass(name: str) -> None:
    trial = TRIALS[name]()
    assert name.split(",")[0] in trial.name
    assert trust.examine(trial, CPU) is None


@pytest.mark.parametrize("name", TRIALS)
def test_results_that_are_one_percent_off_do_not_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    edit(monkeypatch, lambda found, _: [x * 1.01 for x in found])
    assert "wrong results" in trust.examine(TRIALS[name](), CPU)


@pytest.mark.parametrize("name", ["layer_norm backward", "add_layer_norm backward, sums", "bias_gelu backward"])
def test_sums_over_rows_that_miss_a_row_do_not_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def miss(found: list[Tensor], _: int) -> list[Tensor]:
        found[-1] = found[-1] - 0.01 if found[-1].dim() == 1 and found[-1].numel() in (24, 40) else found[-1]
        return found

    edit(monkeypatch, miss)
    assert "wrong results" in trust.examine(TRIALS[name](), CPU)


@pytest.mark.parametrize("name", ["add_layer_norm backward", "bias_gelu forward", "attention forward"])
def test_nan_does_not_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    edit(monkeypatch, lambda found, _: [torch.full_like(x, torch.nan) for x in found])
    assert "wrong results: the error is inf" in trust.examine(TRIALS[name](), CPU)


@pytest.mark.parametrize("name", ["layer_norm forward", "bias_gelu backward", "attention forward"])
def test_a_row_that_differs_in_one_place_does_not_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def spoil(found: list[Tensor], _: int) -> list[Tensor]:
        found[0].view(-1)[-1] += found[0].view(-1)[-1] * 1e-6 + 1e-7
        return found

    edit(monkeypatch, spoil)
    assert "another place of the grid" in trust.examine(TRIALS[name](), CPU)


@pytest.mark.parametrize("name", ["layer_norm forward", "layer_norm backward", "attention forward"])
def test_a_race_does_not_pass(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(trust, "LAUNCHES", 8)
    edit(monkeypatch, lambda found, launch: [x + 1e-7 * (launch > 5) for x in found])
    assert "a race" in trust.examine(TRIALS[name](), CPU)


def test_what_is_out_of_the_card_s_reach_is_out_of_the_check_s_too(monkeypatch: pytest.MonkeyPatch) -> None:
    let_fail(monkeypatch, "layer_norm._forward_kernel", OutOfResources(1, 1, "shared memory"))
    assert "OutOfResources" in trust.examine(norm_trial(False), CPU)
    let_fail(monkeypatch, "layer_norm._forward_kernel", torch.OutOfMemoryError("CUDA out of memory"))
    assert "no memory for its check" in trust.examine(norm_trial(False), CPU)
    lost = RuntimeError("CUDA error: an illegal memory access was encountered")
    let_fail(monkeypatch, "layer_norm._forward_kernel", lost)
    with pytest.raises(RuntimeError) as caught:
        trust.examine(norm_trial(False), CPU)
    assert caught.value is lost


# ----------------------------------------------------------------------------------------------------------------------
# what follows from a check


def loss_and_gradients(x: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_(), torch.ones(24).requires_grad_(), torch.zeros(24).requires_grad_()]
    y = ops.layer_norm(*inputs)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), inputs)]


@pytest.mark.parametrize("wrong", ["forward", "backward"])
def test_what_fails_is_not_used(monkeypatch: pytest.MonkeyPatch, card: Path, wrong: str) -> None:
    real = kernel_ops.kernel

    def kernel(family: str, function: str) -> Callable[..., Any]:
        run = real(family, function)
        return (lambda *a: tuple(x * 1.01 for x in run(*a))) if function == wrong else run

    kernel.cache_clear = lambda: None
    monkeypatch.setattr(kernel_ops, "kernel", kernel)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    with pytest.warns(KernelFallbackWarning, match=r"layer_norm .*wrong results") as caught:
        found = loss_and_gradients(x)
    assert sum(issubclass(w.category, KernelFallbackWarning) for w in caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = loss_and_gradients(x)
    with clipfast.backend("reference"):
        expected = loss_and_gradients(x)
    for one, other, right in zip(found, again, expected, strict=True):
        assert torch.equal(one, right)
        assert torch.equal(other, right)


def test_a_check_runs_once_and_what_passed_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, card: Path) -> None:
    launches = edit(monkeypatch, lambda found, _: found)
    x = torch.randn(5, 24)
    loss_and_gradients(x)
    first = len(launches)
    loss_and_gradients(x)
    assert len(launches) == first + 2  # a forward and a backward kernel
    (file,) = card.glob("clipfast-checked-*.json")
    assert len(json.loads(file.read_text())["passed"]) == 2
    # another process
    trust.forget()
    loss_and_gradients(x)
    assert len(launches) == first + 4


@pytest.mark.parametrize("damage", ["other version", "cut off", "other content", "gone"])
def test_a_record_that_does_not_fit_is_not_believed(monkeypatch: pytest.MonkeyPatch, card: Path, damage: str) -> None:
    launches = edit(monkeypatch, lambda found, _: found)
    x = torch.randn(5, 24)
    loss_and_gradients(x)
    first = len(launches)
    (file,) = card.glob("clipfast-checked-*.json")
    if damage == "other version":
        monkeypatch.setattr(trust, "_versions", lambda device: {"torch": "2.99"})
    elif damage == "gone":
        file.unlink()
    else:
        file.write_text(file.read_text()[:40] if damage == "cut off" else '["passed"]')
    trust.forget()
    loss_and_gradients(x)
    assert len(launches) == 2 * first


def test_a_folder_that_cannot_be_written_to_costs_the_record_alone(
    monkeypatch: pytest.MonkeyPatch, card: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(trust, "_cache_folder", lambda: tmp_path / "file" / "folder")
    assert torch.isfinite(loss_and_gradients(torch.randn(5, 24))[0]).all()


def test_nothing_is_checked_where_that_was_switched_off() -> None:
    code = "from clipfast.ops import trust; import torch; print(trust.is_required(torch.device('cuda')))"
    for value, expected in (
        ("0", "False"),
        ("1", "True"),
        ("maybe", "CLIPFAST_CHECK: got 'maybe', expected '0' or '1'"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"CLIPFAST_CHECK": value}
        )
        assert expected in done.stdout + done.stderr


def test_a_capture_uses_what_was_checked_and_checks_nothing(monkeypatch: pytest.MonkeyPatch, card: Path) -> None:
    launches, captured = edit(monkeypatch, lambda found, _: found), True
    monkeypatch.setattr(fallback, "captures", lambda device: captured)
    x = torch.randn(5, 24)
    with pytest.warns(KernelFallbackWarning, match="call clipfast.warm_up first"):
        found = loss_and_gradients(x)
    assert not launches
    captured = False
    loss_and_gradients(x)
    captured, before = True, len(launches)
    again = loss_and_gradients(x)
    assert len(launches) == before + 2
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_nothing_is_checked_where_tensors_have_no_values(monkeypatch: pytest.MonkeyPatch, card: Path) -> None:
    launches = edit(monkeypatch, lambda found, _: found)
    with FakeTensorMode():
        assert ops.layer_norm(torch.empty(5, 24), torch.empty(24), torch.empty(24)).shape == (5, 24)
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
    traced = make_fx(lambda *x: ops.layer_norm(*x), tracing_mode="fake")(*(torch.ones(24) for _ in range(3)))
    assert "clipfast.layer_norm_forward" in traced.code
    assert not launches
    # what was traced is checked before it runs
    x = torch.randn(5, 24)
    found = compiled(x, torch.ones(24), torch.zeros(24))
    assert len(launches) > 1
    torch.testing.assert_close(found, torch.nn.functional.layer_norm(x, (24,)), rtol=1e-5, atol=1e-6)


def test_a_kernel_that_would_be_compiled_under_capture_is_pytorchs_until_it_is_ready(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured = True
    monkeypatch.setattr(fallback, "captures", lambda device: captured)
    let_fail(monkeypatch, "layer_norm._forward_kernel", NotReady("call clipfast.warm_up before the capture"))
    with pytest.warns(KernelFallbackWarning, match="before the capture"):
        loss_and_gradients(torch.randn(5, 24))
    assert fallback.failure("layer_norm", CPU) is not None
    captured = False
    assert fallback.failure("layer_norm", CPU) is None
    captured = True
    fallback.forget_captures()
    assert fallback.failure("layer_norm", CPU) is None


def test_triton_is_kept_from_compiling_our_kernels_under_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    asked: list[Any] = []
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", lambda **named: asked.append(named) and None)
    capturing.forbid_compilation.cache_clear()
    capturing.forbid_compilation()
    capturing.forbid_compilation()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    class Function:
        def __init__(self, module: str) -> None:
            self.module = module

    ours, other = Function("clipfast.kernels.layer_norm"), Function("somebody.kernels")
    for captured in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captured=captured: captured)
        assert knobs.runtime.jit_cache_hook(fn=other, key="k") is None
        if captured:
            with pytest.raises(NotReady, match="clipfast.warm_up"):
                knobs.runtime.jit_cache_hook(fn=ours, key="k")
        else:
            assert knobs.runtime.jit_cache_hook(fn=ours, key="k") is None
    # who set a hook before is still asked
    assert len(asked) == 3
    capturing.forbid_compilation.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# warm_up


def small_model(**vision: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32} | vision
    text = {"context_length": 8, "vocab_size": 50, "width": 64, "layers": 2, "heads": 2}
    return clipfast.create_model({"embed_dim": 16, "vision_cfg": sizes, "text_cfg": text})


def test_warm_up_checks_what_a_step_needs(monkeypatch: pytest.MonkeyPatch, card: Path) -> None:
    model = small_model()
    ready = clipfast.warm_up(model, training=True)
    assert not ready.refused
    for part in ("attention backward", "packed", "add_layer_norm backward", "bias_gelu forward", "layer_norm forward"):
        assert any(part in name for name in ready.checked), (part, ready)
    assert f"{len(ready.checked)} ready, 0 refused" in str(ready)
    examined: list[str] = []
    monkeypatch.setattr(trust, "examine", lambda trial, device: examined.append(trial.name))
    image, text, _ = model(torch.randn(3, 3, 16, 16), torch.tensor([[1, 49, 0, 0, 0, 0, 0, 0]] * 3))
    (image.sum() + text.sum()).backward()
    assert not examined


def test_warm_up_says_what_is_refused(monkeypatch: pytest.MonkeyPatch, card: Path) -> None:
    let_fail(monkeypatch, "bias_gelu._forward_kernel", OutOfResources(1, 1, "shared memory"))
    with pytest.warns(KernelFallbackWarning, match="bias_gelu"):
        ready = clipfast.warm_up(small_model())
    assert all("bias_gelu" in name for name in ready.refused)
    assert ready.refused
    assert "refused: bias_gelu forward" in str(ready)
