"""Whole models on a GPU, by the rule of docs/numerics.md: autocast, streams, threads, a second card, warm_up.

The bodies run on the CPU too, where that says something.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
from oracle import assert_as_exact_as_reference
from torch import Tensor, nn

import clipfast

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 100, "width": 64, "heads": 2, "layers": 2},
}
LENGTHS = (5, 24, 2, 13, 5, 12, 7, 3)
SEEDS = range(3)
DELAY = 300_000_000


def model_of(seed: int, device: str) -> nn.Module:
    torch.manual_seed(seed)
    model = clipfast.create_model(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no bias stays at zero, no norm at one
                parameter.add_(0.2 * torch.rand_like(parameter) - 0.1)
    return model.to(device)


def batch_of(seed: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 98, (len(LENGTHS), 24), generator=generator)
    tokens[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = 99
    return torch.randn(len(LENGTHS), 3, 32, 32, generator=generator).to(device), tokens.to(device)


def step(model: nn.Module, images: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Return the features, the loss, and the gradient of every parameter."""
    parameters = dict(model.named_parameters())
    image, text, scale = model(images, tokens)[:3]
    loss = clipfast.ContrastiveLoss()(image, text, scale)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    found = {"image features": image, "text features": text, "loss": loss}
    return {k: v.detach() for k, v in found.items()} | dict(zip(parameters, gradients, strict=True))


def oracle_of(seed: int, device: str) -> dict[str, Tensor]:
    images, tokens = batch_of(seed, device)
    with clipfast.backend("reference"):
        return step(model_of(seed, device).double(), images.double(), tokens)


def reference_of(seed: int, device: str) -> dict[str, Tensor]:
    with clipfast.backend("reference"):
        return step(model_of(seed, device), *batch_of(seed, device))


def assert_rule(
    found: list[dict[str, Tensor]],
    reference: list[dict[str, Tensor]],
    oracle: list[dict[str, Tensor]],
    dtype: torch.dtype | None = None,
) -> None:
    """Hold several models to the rule as one: of few values, the largest error is mostly luck."""
    for name in oracle[0]:
        # of scalars: of the loss, whose logits reach ±14, and of the sums behind the gradient of their scale
        scale = {"loss": 1.0, "logit_scale": 14.3}.get(name)
        stacked = [torch.stack([one[name].to("cpu") for one in many]) for many in (found, reference, oracle)]
        assert_as_exact_as_reference(*stacked, name, scale, dtype)


def backends(device: str) -> tuple[str, ...]:
    """The kernels, and what users get; the interpreter's arithmetic of bfloat16 is not the hardware's."""
    return ("triton", "auto") if device.startswith("cuda") else ("auto",)


@contextlib.contextmanager
def stream_of_its_own(device: str) -> Iterator[None]:
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, device: str) -> None:
    oracle = [oracle_of(seed, device) for seed in SEEDS]
    with torch.autocast(device, dtype=dtype):
        reference = [reference_of(seed, device) for seed in SEEDS]
        for backend in backends(device):
            with clipfast.backend(backend):
                found = [step(model_of(seed, device), *batch_of(seed, device)) for seed in SEEDS]
            assert_rule(found, reference, oracle, dtype)


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_behind_a_delay_on_a_stream(device: str) -> None:
    oracle, reference = ([of(seed, device) for seed in SEEDS] for of in (oracle_of, reference_of))
    for backend in backends(device):
        found = []
        with clipfast.backend(backend):
            for seed in SEEDS:
                model, (images, tokens) = model_of(seed, device), batch_of(seed, device)
                late = copy.deepcopy(model)
                with torch.no_grad():
                    for parameter in late.parameters():
                        parameter.fill_(torch.nan)
                late_images = torch.full_like(images, torch.nan)
                if device != "cpu":
                    torch.cuda.synchronize()
                with stream_of_its_own(device):
                    if device != "cpu":
                        torch.cuda._sleep(DELAY)
                    late.load_state_dict(model.state_dict())
                    found.append(step(late, late_images.copy_(images), tokens))
        assert_rule(found, reference, oracle)


def train(device: str, drawn: list, seeds: tuple[int, ...], start: threading.Barrier, found: list) -> None:
    with stream_of_its_own(device):
        for seed in seeds:
            model, batch = drawn[seed]
            start.wait(60)
            for _ in range(3):
                found[seed] = step(model, *batch)


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("device", DEVICES)
def test_two_threads_train_at_once(device: str) -> None:
    oracle, reference = ([of(seed, device) for seed in SEEDS] for of in (oracle_of, reference_of))
    for backend in backends(device):
        found: list = [None for _ in SEEDS]
        start = threading.Barrier(2)
        # torch.manual_seed is the process's: models are drawn before
        drawn = [(model_of(seed, device), batch_of(seed, device)) for seed in SEEDS]
        if device != "cpu":
            torch.cuda.synchronize()
        with clipfast.backend(backend):
            # 1 runs beside 0, then beside 2
            threads = [
                threading.Thread(target=train, args=(device, drawn, seeds, start, found)) for seeds in ((0, 2), (1, 1))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(120)
                assert not thread.is_alive()
        assert None not in found, "a thread failed"
        assert_rule(found, reference, oracle)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
def test_a_model_on_the_second_card_while_the_first_is_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    oracle, reference = ([of(seed, "cuda:1") for seed in SEEDS] for of in (oracle_of, reference_of))
    for backend in backends("cuda"):
        with clipfast.backend(backend):
            found = [step(model_of(seed, "cuda:1"), *batch_of(seed, "cuda:1")) for seed in SEEDS]
        assert torch.cuda.current_device() == 0
        assert all(x.device.index == 1 for one in found for x in one.values())
        assert_rule(found, reference, oracle)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_warm_up_checks_every_kernel_and_says_nothing(dtype: torch.dtype) -> None:
    model, (images, tokens) = model_of(0, "cuda").to(dtype), batch_of(0, "cuda")
    images = images.to(dtype)
    with clipfast.backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("error")
        # said because it was asked for by name: the loss is the op library's
        warnings.filterwarnings("ignore", message=".*it has no triton implementation")
        clipfast.warm_up(model, images=images, tokens=tokens, training=True)
        step(model, images, tokens)
        # what was checked is ready where nothing may be compiled
        expected = model.encode_image(images).detach()
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            captured = model.encode_image(images)
        graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=0)
