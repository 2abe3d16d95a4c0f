"""The losses when the op library's CUDA kernels fail or are wrong, with its CPU kernels in their place."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from failing import fresh_failures  # noqa: F401  # a fixture
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.ops import contrastive_cuda, contrastive_kernels, contrastive_loss, contrastive_narrow, fallback, trust
from clipfast.ops.contrastive_kernels import Kernels
from clipfast.ops.fallback import KernelFallbackWarning

pytestmark = [
    pytest.mark.usefixtures("fresh_failures", "on_card"),
    pytest.mark.skipif(contrastive_kernels.native is None, reason=str(contrastive_kernels.native_unavailable)),
]


def two_passes(*inputs: Any) -> Tensor:
    """SigLIP's loss by both of its kernels: with a mean, training needs one of them alone."""
    return ops.siglip_loss(*inputs, reduction="none").mean()


LOSSES = {"contrastive_loss": ops.contrastive_loss, "siglip_loss": two_passes}
PASSES = ("statistics", "gradients")
NOT_LAUNCHED = "contrastive: a kernel could not be launched: cudaErrorNoKernelImageForDevice: no kernel image"


@pytest.fixture
def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let features in host memory take the way of features on a card."""
    file = contrastive_loss.__globals__  # the name is the function's, and not that of its file
    monkeypatch.setitem(file, "native_kernels", lambda _: contrastive_cuda.kernels)
    monkeypatch.setitem(file, "native_refusal", lambda op, image, *_: fallback.failure(op, image.device))


def let_fail(monkeypatch: pytest.MonkeyPatch, op: str, which: str, error: BaseException) -> list[int]:
    calls: list[int] = []

    def broken(*_: Any) -> None:
        calls.append(1)
        raise error

    field = which if op == "contrastive_loss" else f"siglip_{which}"
    monkeypatch.setattr(contrastive_kernels, "native", contrastive_kernels.native._replace(**{field: broken}))
    return calls


def features(batch: int = 70, width: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.functional.normalize(torch.randn(batch, width, generator=generator), dim=1) for _ in range(2)]
    return [x.requires_grad_() for x in made]


def results(op: str, around: Any = lambda f, *x: f(*x)) -> list[Tensor]:
    inputs = [*features(), torch.tensor(20.0, requires_grad=True)]
    loss = around(LOSSES[op], *inputs)
    return [loss.detach(), *torch.autograd.grad(loss, inputs)]


def assert_right_with_one_warning(op: str, around: Any = lambda f, *x: f(*x)) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [results(op, around) for _ in range(2)]
    told = [str(w.message) for w in caught if issubclass(w.category, ops.FallbackWarning)]
    assert len(told) == 1, told
    assert op in told[0]
    assert "cudaErrorNoKernelImageForDevice" in told[0]
    with clipfast.backend("reference"):
        expected = results(op)
    for once in found:
        for actual, right in zip(once, expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("op", LOSSES)
def test_a_kernel_that_cannot_be_launched(monkeypatch: pytest.MonkeyPatch, op: str, which: str) -> None:
    calls = let_fail(monkeypatch, op, which, RuntimeError(NOT_LAUNCHED))
    assert_right_with_one_warning(op)
    assert len(calls) == 1


def test_siglips_one_pass_that_cannot_be_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = let_fail(monkeypatch, "siglip_loss", "gradients", RuntimeError(NOT_LAUNCHED))
    monkeypatch.setitem(LOSSES, "siglip_loss", ops.siglip_loss)
    assert_right_with_one_warning("siglip_loss")
    assert len(calls) == 1


@pytest.mark.parametrize("which", PASSES)
def test_in_a_compiled_loss(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    compiled = torch.compile(ops.contrastive_loss, fullgraph=True, backend="aot_eager")
    results("contrastive_loss", lambda f, *x: compiled(*x))
    let_fail(monkeypatch, "contrastive_loss", which, RuntimeError(NOT_LAUNCHED))
    assert_right_with_one_warning("contrastive_loss", lambda f, *x: compiled(*x))


@pytest.mark.parametrize("op", LOSSES)
@pytest.mark.parametrize("words", ["CUDA out of memory", "could not be launched: cudaErrorIllegalAddress: an illegal"])
def test_what_nobody_can_mend_passes_through(monkeypatch: pytest.MonkeyPatch, op: str, words: str) -> None:
    error = RuntimeError(words)
    let_fail(monkeypatch, op, "statistics", error)
    with pytest.raises(RuntimeError) as caught:
        results(op)
    assert caught.value is error
    assert not fallback.failures()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", LOSSES)
def test_right_kernels_pass_their_check(op: str, dtype: torch.dtype) -> None:
    trial = contrastive_cuda.trial(op, torch.empty(3, 40, dtype=dtype))
    assert trust.examine(trial, torch.device("cpu")) is None


def scaled(by: float, index: int) -> Any:
    def edit(kernel: Any) -> Any:
        def wrong(*arguments: Any) -> Any:
            found = kernel(*arguments)
            if isinstance(found, Tensor):
                return found * by
            return tuple(x * by if i == index else x for i, x in enumerate(found))

        return wrong

    return edit


@pytest.mark.parametrize(
    ("op", "index"), [*(("contrastive_loss", i) for i in range(3)), *(("siglip_loss", i) for i in range(5))]
)
def test_wrong_gradients_fail_the_check(monkeypatch: pytest.MonkeyPatch, op: str, index: int) -> None:
    native, field = contrastive_kernels.native, "gradients" if op == "contrastive_loss" else "siglip_gradients"
    wrong: Kernels = native._replace(**{field: scaled(1.01, index)(getattr(native, field))})
    monkeypatch.setattr(contrastive_kernels, "native", wrong)
    trial = contrastive_cuda.trial(op, torch.empty(3, 40, dtype=torch.float32))
    assert "wrong results" in trust.examine(trial, torch.device("cpu"))


def test_a_race_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    native, calls = contrastive_kernels.native, []

    def racing(*arguments: Any) -> Any:
        calls.append(1)
        found = native.gradients(*arguments)
        return found if len(calls) < 5 else (torch.nextafter(found[0], found[1]), *found[1:])

    monkeypatch.setattr(contrastive_kernels, "native", native._replace(gradients=racing))
    trial = contrastive_cuda.trial("contrastive_loss", torch.empty(3, 40, dtype=torch.float32))
    assert "a race" in trust.examine(trial, torch.device("cpu"))
    assert len(calls) == 5


def test_a_kernel_that_fails_its_check_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    native = contrastive_kernels.native
    calls: list[int] = []

    def wrong(*arguments: Any) -> Any:
        calls.append(1)
        return scaled(1.01, 0)(native.gradients)(*arguments)

    monkeypatch.setattr(contrastive_kernels, "native", native._replace(gradients=wrong))
    monkeypatch.setattr(trust, "is_required", lambda device: True)
    monkeypatch.setattr(trust, "_kept", lambda device: set())
    with pytest.warns(KernelFallbackWarning, match=r"contrastive_loss .* wrong results"):
        found = results("contrastive_loss")
    tried = len(calls)
    again = results("contrastive_loss")
    assert len(calls) == tried, "it is checked once"
    with clipfast.backend("reference"):
        expected = results("contrastive_loss")
    for actual, other, right in zip(found, again, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-6)
        assert torch.equal(actual, other)


@pytest.mark.parametrize("op", ["contrastive_loss", "siglip_loss"])
def test_what_is_checked_is_what_runs_under_autocast(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(contrastive_narrow, "_DEVICES", ("cpu",))
    monkeypatch.setattr(trust, "is_required", lambda device: True)
    monkeypatch.setattr(trust, "_kept", lambda device: set())
    tried: list[torch.dtype] = []

    def watched(op: str, device: torch.device, dtype: torch.dtype, width: int, programs: int) -> Any:
        tried.append(dtype)
        return probe(op, device, dtype, width, programs)

    probe = contrastive_cuda._probe
    monkeypatch.setattr(contrastive_cuda, "_probe", watched)
    # another width than elsewhere: what has been checked is not checked again
    x, _ = features(20, 40)
    with torch.autocast("cpu", torch.bfloat16):
        getattr(ops, op)(x, x.detach(), 10.0).backward()
    assert tried == [torch.float16]
