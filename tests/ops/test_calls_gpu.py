"""Every kernel of ours among other work on a GPU: on a stream behind a delay, from two threads, on a second card.

What can be checked without a card runs on the CPU too, where there are no streams.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator

import interpreter
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import clipfast
from clipfast import ops
from clipfast.ops import dispatch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
Call = tuple[str, Callable[..., tuple], tuple[tuple[int, ...], ...]]
# op, its arguments made of tensors, and their shapes
CALLS: dict[str, Call] = {
    "attention": ("attention", lambda qkv: (qkv, 2), ((3, 77, 3 * 128),)),
    "layer_norm": ("layer_norm", lambda *x: x, ((500, 256), (256,), (256,))),
    "add_layer_norm": ("add_layer_norm", lambda *x: x, ((500, 256), (500, 256), (256,), (256,))),
    "bias_gelu": ("bias_gelu", lambda *x: (*x, "quick"), ((500, 256), (256,))),
    "contrastive_loss": (
        "contrastive_loss",
        lambda image, text, scale: (normalize(image, dim=-1), normalize(text, dim=-1), 20 + scale),
        ((300, 64), (300, 64), ()),
    ),
    "siglip_loss": (
        "siglip_loss",
        lambda image, text, scale: (normalize(image, dim=-1), normalize(text, dim=-1), 20 + scale),
        ((300, 64), (300, 64), ()),
    ),
}
# the kernels, which are deterministic, and on CPUs what stands there
BACKENDS = {"contrastive_loss": "native", "siglip_loss": "native"}
DELAY = 300_000_000  # clocks of a card: more than a tenth of a second


def drawn(name: str, device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    made = [torch.randn(shape, generator=generator) for shape in CALLS[name][2]]
    return [x.to(device, torch.float32 if x.dim() == 0 else dtype) for x in made]


def results(name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs and the gradients of all inputs."""
    op, arguments, _ = CALLS[name]
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = getattr(ops, op)(*arguments(*leaves))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weights = [torch.linspace(-1, 2, y.numel(), device=y.device, dtype=y.dtype).view_as(y) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, weights))


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert not a.isnan().any()
        assert torch.equal(a.cpu(), b.cpu())


@contextlib.contextmanager
def kernels_of(name: str, device: str) -> Iterator[None]:
    """Use the kernels, and nothing else, on a card."""
    backend = BACKENDS.get(name, "triton") if device.startswith("cuda") else "auto"
    op, arguments, _ = CALLS[name]
    if backend != "auto":
        able = dispatch.able(op, *arguments(*drawn(name, device)))
        assert backend in able, f"{backend} does not serve {op} here: {able}"
    with clipfast.backend(backend), warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def stream_of_its_own(device: str) -> Iterator[Callable[[], bool]]:
    """Run on another stream; what is yielded says whether work still waits there."""
    if device == "cpu":
        yield lambda: True
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield lambda: not stream.query()
    stream.synchronize()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CALLS)
def test_behind_a_delay_on_a_stream(name: str, device: str) -> None:
    inputs = drawn(name, device)
    with kernels_of(name, device):
        expected = results(name, inputs)  # and compiles
        # the inputs are made on the stream, later than a launch on any other would read them
        late = [torch.full_like(x, torch.nan) for x in inputs]
        if device != "cpu":
            torch.cuda.synchronize()
        with stream_of_its_own(device) as waits:
            if device != "cpu":
                torch.cuda._sleep(DELAY)
            for target, x in zip(late, inputs, strict=True):
                target.copy_(x)
            found = results(name, late)
            waiting = waits()
    assert waiting, "the delay was over before all was launched"
    assert_same(found, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_at_once(device: str) -> None:
    alone: dict[tuple[str, int], list[Tensor]] = {}
    problems: list[str] = []
    start = threading.Barrier(2)

    def work(name: str, seed: int) -> None:
        try:
            with stream_of_its_own(device):
                inputs = drawn(name, device, seed)
                start.wait(60)
                for _ in range(5):
                    assert_same(results(name, inputs), alone[name, seed])
        except BaseException as error:
            problems.append(f"{name}, {seed}: {type(error).__name__}: {error}")

    for name in CALLS:
        with kernels_of(name, device):
            for seed in (0, 1):
                alone[name, seed] = results(name, drawn(name, device, seed))
            if device != "cpu":
                torch.cuda.synchronize()
            threads = [threading.Thread(target=work, args=(name, seed)) for seed in (0, 1)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
                assert not thread.is_alive()
    assert not problems


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_on_the_second_card_while_the_first_is_current(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    with kernels_of(name, "cuda:1"):
        found = results(name, drawn(name, "cuda:1"))
    assert torch.cuda.current_device() == 0
    assert all(x.device.index == 1 for x in found)
    with torch.cuda.device(1), kernels_of(name, "cuda:1"):
        assert_same(found, results(name, drawn(name, "cuda:1")))


@pytest.mark.skipif(interpreter.DEVICE == "cuda", reason="on a card the wrong stream itself is tried")
def test_the_check_sees_inputs_that_came_too_late() -> None:
    inputs = drawn("layer_norm", "cpu")
    late = [torch.full_like(x, torch.nan) for x in inputs]
    with pytest.raises(AssertionError):
        assert_same(results("layer_norm", late), results("layer_norm", inputs))
