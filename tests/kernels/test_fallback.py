"""A kernel that cannot be compiled, loaded or launched: PyTorch computes the same, and one warning says why."""

from __future__ import annotations

import errno
import subprocess
import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from failing import fresh_failures, let_fail  # noqa: F401  # a fixture
from oracle import assert_as_exact_as_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.errors import OutOfResources, PTXASError

import clipfast
from clipfast import ops
from clipfast.ops import fallback, kernel_ops
from clipfast.ops.fallback import KernelFallbackWarning

pytestmark = pytest.mark.usefixtures("fresh_failures", "triton_backend")

OFFSETS = [0, 9, 10, 40]


@dataclass(frozen=True)
class Call:
    """A call of an op on inputs of these shapes."""

    op: str
    shapes: tuple[tuple[int, ...], ...]
    run: Callable[..., Tensor | tuple[Tensor, ...]]


CALLS = {
    "layer_norm": Call("layer_norm", ((5, 40), (40,), (40,)), ops.layer_norm),
    "add_layer_norm": Call("add_layer_norm", ((5, 40), (5, 40), (40,), (40,)), ops.add_layer_norm),
    "bias_gelu": Call("bias_gelu", ((5, 40), (40,)), lambda x, bias: ops.bias_gelu(x, bias, "quick")),
    "attention": Call("attention", ((1, 17, 192),), lambda x: ops.attention(x, 2)),
    "packed": Call(
        "attention",
        ((40, 192),),
        lambda x: ops.attention(x, 2, causal=True, cu_seqlens=torch.tensor(OFFSETS, dtype=torch.int32)),
    ),
}

KERNELS = [
    ("layer_norm", "layer_norm._forward_kernel"),
    ("layer_norm", "layer_norm._backward_kernel"),
    ("layer_norm", "partial_sums._sum_kernel"),
    ("add_layer_norm", "layer_norm._forward_kernel"),
    ("add_layer_norm", "layer_norm._backward_kernel"),
    ("bias_gelu", "bias_gelu._forward_kernel"),
    ("bias_gelu", "bias_gelu._backward_kernel"),
    ("attention", "attention.streaming_forward"),
    ("attention", "attention.streaming_backward_queries"),
    ("attention", "attention.streaming_backward_keys"),
    ("packed", "attention.streaming_forward"),
    ("packed", "attention.streaming_backward_keys"),
]

# what has been seen, or is raised by the sources of Triton, PyTorch and the driver
ERRORS = {
    "shared memory": OutOfResources(300_000, 232_448, "shared memory"),
    "no C compiler": RuntimeError(
        "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs"
    ),
    "no binary": RuntimeError("Triton Error [CUDA]: no kernel image is available for execution on the device"),
    "no binary, by name": RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU"),
    "old driver": RuntimeError("Triton Error [CUDA]: the provided PTX was compiled with an unsupported toolchain."),
    "invalid argument": RuntimeError("Triton Error [CUDA]: invalid argument"),
    "ptxas": PTXASError("ptxas fatal: Unsupported .version 8.7; current version is 8.4"),
    "the launcher's compiler": subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    "no permission": PermissionError(errno.EACCES, "Permission denied", "/cache/triton"),
    "no space": OSError(errno.ENOSPC, "No space left on device"),
    "half an installation": ImportError("cannot import name 'libtriton'"),
    "another Triton": AttributeError("'JITFunction' object has no attribute 'run'"),
    "an internal error": AssertionError("LLVM ERROR: unsupported"),
}

FINAL = {
    "out of memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "out of memory in the driver": RuntimeError("Triton Error [CUDA]: out of memory"),
    "out of host memory": MemoryError(),
    "an illegal address": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "a misaligned address": RuntimeError("CUDA error: misaligned address"),
    "an assertion": RuntimeError("CUDA error: device-side assert triggered"),
    "a fault of a kernel": RuntimeError("CUDA error: unspecified launch failure"),
    "a broken memory": RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    "by name": RuntimeError("contrastive_statistics: a kernel could not be launched: cudaErrorIllegalAddress: why"),
    "a capture": RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    "a forbidden wait": RuntimeError("called a synchronizing CUDA operation"),
    "Ctrl-C": KeyboardInterrupt(),
}


def inputs_of(call: Call, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in call.shapes]
    return [x.to(dtype).requires_grad_() for x in made]


def results(call: Call, inputs: list[Tensor], around: Callable[..., Any] = lambda f, *x: f(*x)) -> list[Tensor]:
    """Return outputs and gradients; ``around`` runs the call."""
    outputs = around(call.run, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum(
        (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum() for y in outputs
    )
    return [*outputs, *torch.autograd.grad(total, inputs)]


def assert_right(call: Call, inputs: list[Tensor], found: list[Tensor]) -> None:
    with clipfast.backend("reference"):
        reference = results(call, inputs)
        oracle = results(call, [x.detach().double().requires_grad_() for x in inputs])
    for i, (f, r, o) in enumerate(zip(found, reference, oracle, strict=True)):
        assert_as_exact_as_reference(f, r, o, f"{call.op} {i}")


def assert_right_with_one_warning(
    call: Call, words: str, around: Callable[..., Any] = lambda f, *x: f(*x), dtype: torch.dtype = torch.float32
) -> None:
    inputs = inputs_of(call, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = results(call, inputs, around)
        results(call, inputs, around)
    told = [w for w in caught if issubclass(w.category, KernelFallbackWarning)]
    assert len(told) == 1, [str(w.message) for w in caught]
    message = str(told[0].message)
    assert all(part in message for part in (call.op, "the cpu", words, "clipfast doctor")), message
    assert_right(call, inputs, found)


@pytest.mark.parametrize(("call", "kernel"), KERNELS)
def test_each_kernel_may_fail(monkeypatch: pytest.MonkeyPatch, call: str, kernel: str) -> None:
    failing = let_fail(monkeypatch, kernel, ERRORS["shared memory"])
    assert_right_with_one_warning(CALLS[call], "shared memory")
    assert failing.launches == 1, "a kernel that failed is not asked again"


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("kernel", ["layer_norm._forward_kernel", "layer_norm._backward_kernel"])
def test_each_failure(monkeypatch: pytest.MonkeyPatch, kernel: str, error: str) -> None:
    let_fail(monkeypatch, kernel, ERRORS[error])
    assert_right_with_one_warning(CALLS["layer_norm"], type(ERRORS[error]).__name__)


def test_a_triton_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError(f"{name}: libtriton.so: cannot open shared object file")

    monkeypatch.setattr(kernel_ops.importlib, "import_module", broken)
    assert_right_with_one_warning(CALLS["bias_gelu"], "libtriton.so")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("call", "kernel"),
    [
        ("layer_norm", "layer_norm._forward_kernel"),
        ("layer_norm", "layer_norm._backward_kernel"),
        ("add_layer_norm", "layer_norm._backward_kernel"),
        ("bias_gelu", "bias_gelu._backward_kernel"),
        ("attention", "attention.streaming_forward"),
        ("attention", "attention.streaming_backward_keys"),
    ],
)
def test_under_checkpointing(monkeypatch: pytest.MonkeyPatch, call: str, kernel: str, reentrant: bool) -> None:
    """Two blocks: the second one's failure comes between the passes of the first."""
    let_fail(monkeypatch, kernel, ERRORS["shared memory"])

    def twice(function: Callable[..., Any], x: Tensor, *rest: Tensor) -> Any:
        def block(x: Tensor, *rest: Tensor) -> Any:
            y = function(x, *rest)
            return y[0] if isinstance(y, tuple) else y

        first = checkpoint(block, x, *rest, use_reentrant=reentrant)
        if first.shape != x.shape:
            first = torch.cat([first] * 3, dim=-1)
        return checkpoint(block, first, *rest, use_reentrant=reentrant)

    # reentrant checkpointing knows no torch.autograd.grad
    def with_backward() -> list[Tensor]:
        inputs = inputs_of(CALLS[call])
        y = twice(CALLS[call].run, *inputs)
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        return [y, *(x.grad for x in inputs)]

    with pytest.warns(KernelFallbackWarning, match="shared memory"):
        found = with_backward()
    with clipfast.backend("torch" if call == "attention" else "reference"):
        expected = with_backward()
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "kernel"), [("layer_norm", "layer_norm._forward_kernel"), ("bias_gelu", "bias_gelu._backward_kernel")]
)
def test_in_a_compiled_model(monkeypatch: pytest.MonkeyPatch, call: str, kernel: str) -> None:
    compiled = torch.compile(CALLS[call].run, fullgraph=True, backend="aot_eager")
    results(CALLS[call], inputs_of(CALLS[call]), lambda f, *x: compiled(*x))
    let_fail(monkeypatch, kernel, ERRORS["no binary"])
    # it was compiled when the kernels worked
    assert_right_with_one_warning(CALLS[call], "no kernel image", lambda f, *x: compiled(*x))


@pytest.mark.parametrize("call", CALLS)
def test_under_autocast_results_keep_their_dtype(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    for kernel in {kernel for name, kernel in KERNELS if name == call and "forward" in kernel}:
        let_fail(monkeypatch, kernel, ERRORS["ptxas"])

    def in_autocast(function: Callable[..., Any], *inputs: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return function(*inputs)

    assert_right_with_one_warning(CALLS[call], "PTXASError", in_autocast)


@pytest.mark.parametrize("error", FINAL)
@pytest.mark.parametrize("kernel", ["bias_gelu._forward_kernel", "bias_gelu._backward_kernel"])
def test_what_nobody_can_mend_passes_through(monkeypatch: pytest.MonkeyPatch, kernel: str, error: str) -> None:
    failing, call = let_fail(monkeypatch, kernel, FINAL[error]), CALLS["bias_gelu"]
    for attempt in (1, 2):
        with pytest.raises(type(FINAL[error])) as caught:
            results(call, inputs_of(call))
        assert caught.value is FINAL[error]
        assert failing.launches == attempt, "nothing was remembered"
    assert not fallback.failures()


def test_a_wrong_call_is_the_users_and_stays_as_it_was() -> None:
    mistake = ValueError("x: got 3 rows, expected 4")

    def wrong(*_: Any) -> None:
        raise mistake

    with pytest.raises(ValueError, match="expected 4") as caught:
        fallback.serve("layer_norm", torch.device("cpu"), wrong, wrong, torch.ones(3))
    assert caught.value is mistake
    assert caught.value.__cause__ is None
    assert not fallback.failures()


def test_pytorchs_own_lack_of_memory_is_told_as_such() -> None:
    def broken(*_: Any) -> None:
        raise OutOfResources(1, 1, "shared memory")

    def large(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError):
        fallback.serve("layer_norm", torch.device("cpu"), broken, large, torch.ones(3))
    assert not fallback.failures()


def test_explain_says_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    let_fail(monkeypatch, "bias_gelu._forward_kernel", ERRORS["no C compiler"])
    x = torch.ones(3, 8)
    with pytest.warns(KernelFallbackWarning):
        ops.bias_gelu(x)
    with torch.no_grad(), clipfast.backend("auto"):
        said = clipfast.explain("bias_gelu", x)
    assert said.startswith(("bias_gelu: native", "bias_gelu: reference"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ops.FallbackWarning)
        assert "Failed to find C compiler" in clipfast.explain("bias_gelu", x)


def test_threads_that_fail_at_once_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    let_fail(monkeypatch, "bias_gelu._forward_kernel", ERRORS["no binary"])
    together, right = threading.Barrier(4), []

    def run() -> None:
        together.wait(10)
        right.append(torch.equal(ops.bias_gelu(torch.ones(3, 8)), torch.nn.functional.gelu(torch.ones(3, 8))))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == [True] * 4
    assert sum(issubclass(w.category, KernelFallbackWarning) for w in caught) == 1


@pytest.mark.parametrize("grad", [True, False])
def test_a_whole_model_trains_on_when_everything_fails(monkeypatch: pytest.MonkeyPatch, grad: bool) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 64, "layers": 2, "heads": 2},
    }
    torch.manual_seed(0)
    model, tokens = clipfast.create_model(config), torch.tensor([[1, 2, 49, 0], [3, 49, 0, 0]])
    images = torch.randn(2, 3, 16, 16)

    def step() -> list[Tensor]:
        model.zero_grad()
        with nullcontext() if grad else torch.no_grad():
            image, text, scale = model(images, tokens)
            loss = clipfast.ContrastiveLoss()(image, text, scale)
        if grad:
            loss.backward()
        return [loss, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    with clipfast.backend("reference"):
        expected = step()
    for kernel in {kernel for _, kernel in KERNELS}:
        let_fail(monkeypatch, kernel, ERRORS["no C compiler"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = step()
    told = [str(w.message) for w in caught if issubclass(w.category, KernelFallbackWarning)]
    assert len(told) == 4, told  # one for each op
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-5)
