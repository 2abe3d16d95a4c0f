"""The contrastive losses' ops on CUDA, against fp64 oracles in PyTorch."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch
from contrastive_oracle import BIAS, LOSSES, compare, oracle_in_chunks, run
from torch import Tensor

from clipfast.ops import contrastive_kernels, library

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(b, 512) for b in (1, 2, 63, 64, 1000, 4097)] + [(1000, d) for d in (1, 32, 640, 768, 1024)]


@pytest.fixture(autouse=True)
def _needs_the_kernels() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    if library.unavailable() is not None or library.build_info()["cuda"] == "none":
        pytest.skip("the op library was built without CUDA")


def features(batch: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(batch + width)
    x = torch.randn(2, batch, width, device="cuda", dtype=torch.float64, generator=generator)
    image, text = torch.nn.functional.normalize(x, dim=-1).to(dtype)
    return image, text


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, device="cuda", dtype=dtype)


def softmax(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and the gradients of image, text and scale, by the ops."""
    batch = image.shape[0]
    ops = torch.ops.clipfast
    row_lse, col_lse, positive, _, _ = ops.contrastive_statistics(image, text, scale, None, None, 0)
    weight = torch.full_like(positive, 0.5 / batch)
    gradients = ops.contrastive_gradients(image, text, scale, None, None, row_lse, col_lse, weight, weight, 0)
    losses = sum((lse[0] - positive + lse[1]) / 2 for lse in (row_lse, col_lse))
    return losses.mean(), *gradients


def siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    ops = torch.ops.clipfast
    row_loss = ops.siglip_statistics(image, text, scale, bias, None, None, 0)
    weight = torch.full_like(row_loss, 1 / image.shape[0])
    return row_loss.mean(), *ops.siglip_gradients(image, text, scale, bias, None, None, weight, 0)[1:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_against_fp64(name: str, batch: int, width: int, dtype: torch.dtype) -> None:
    compare(name, "native", *features(batch, width, dtype), scale=100.0)


# past what one launch of the statistics (8,192 rows) and one chunk of the gradients hold: by one row, and thrice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("batch", "width"), [(8193, 64), (20011, 72)])
@pytest.mark.parametrize("name", LOSSES)
def test_many_pairs(name: str, batch: int, width: int, dtype: torch.dtype) -> None:
    image, text = features(batch, width, dtype)
    compare(name, "native", image, text, 60.0, exact=oracle_in_chunks(name, image, text, 60.0, BIAS))


@pytest.mark.parametrize("name", LOSSES)
def test_float64(name: str) -> None:
    compare(name, "native", *features(300, 48, torch.float64), scale=50.0)


def test_rows_that_start_anywhere() -> None:
    wide = torch.nn.functional.normalize(torch.randn(130, 2 * 37 + 3, device="cuda"), dim=-1).to(torch.bfloat16)
    compare("contrastive", "native", wide[:, 1:38], wide[:, 38:75], scale=30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_twice(dtype: torch.dtype) -> None:
    image, text = features(1000, 512, dtype)
    for loss in (lambda: softmax(image, text, scalar(100.0)), lambda: siglip(image, text, scalar(10.0), scalar(-10.0))):
        assert all(torch.equal(a, b) for a, b in zip(loss(), loss(), strict=True))


def test_a_graph_captures_it() -> None:
    image, text = features(1000, 512, torch.bfloat16)
    scale = scalar(100.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        softmax(image, text, scale)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = softmax(image, text, scale)
    image.copy_(image.flip(0))
    scale.fill_(20.0)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, softmax(image, text, scale), strict=True))


def test_memory() -> None:
    batch, width = 16384, 512
    image, text = features(batch, width, torch.bfloat16)
    scale = scalar(100.0)
    softmax(image, text, scale)  # the matrix products' own workspace
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    softmax(image, text, scale)
    torch.cuda.synchronize()
    # the features themselves are 4 · B · D bytes, and a chunk of the logits' gradient has 4,096 rows
    peak = torch.cuda.max_memory_allocated() - before + 4 * batch * width
    assert peak <= 12 * batch * width + 2 * 4096 * batch + (64 << 20)


def test_autocast_takes_float32_features_to_tensor_cores() -> None:
    image, text = features(1000, 512, torch.float32)
    exact = oracle_in_chunks("contrastive", image, text, 100.0, BIAS)
    found = {}
    for autocast in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found[autocast] = run(LOSSES["contrastive"], image, text, 100.0)
    errors = {
        k: [abs(x.double().cpu() - torch.as_tensor(y)).max() for x, y in zip(v[1:3], exact[1:3], strict=True)]
        for k, v in found.items()
    }
    largest = abs(exact.d_image).max()
    assert all(error <= 2 * 2**-11 * largest for error in errors[True])
    assert all(a < b / 100 for a, b in zip(errors[False], errors[True], strict=True))


def test_gradients_in_the_precision_of_sums_and_with_factors() -> None:
    image, text = features(1000, 500, torch.float16)
    ops, scale = torch.ops.clipfast, scalar(20.0)
    f, g = (torch.exp2(torch.randint(-6, 6, (1000,), device="cuda").float()) for _ in range(2))
    weight = torch.full((1000,), 1e-3, device="cuda")
    found = ops.siglip_gradients(image, text, scale, scalar(-9.0), f, g, weight, 0, True)
    exact = contrastive_kernels.chunked.siglip_gradients(
        image.double(), text.double(), scale.double(), scalar(-9.0, torch.float64), f.double(), g.double(),
        weight.double(), 0, True,
    )  # fmt: skip
    for actual, expected in zip(found, exact, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - expected).abs().max() <= 2**-9 * expected.abs().max()


def test_errors_name_the_argument() -> None:
    image, text = features(8, 16, torch.bfloat16)
    scale, ops = scalar(1.0), torch.ops.clipfast
    with pytest.raises(RuntimeError, match=r"contrastive_statistics\(text\): got width 8, expected 16"):
        ops.contrastive_statistics(image, text[:, :8], scale, None, None, 0)
    with pytest.raises(RuntimeError, match=r"\(image\): got shape \[0, 16\]"):
        ops.contrastive_statistics(image[:0], text, scale, None, None, 0)
    with pytest.raises(RuntimeError, match=r"\(logit_scale\): got bfloat16, expected float32"):
        ops.contrastive_statistics(image, text, scale.bfloat16(), None, None, 0)
    with pytest.raises(RuntimeError, match=r"\(image_factor\): .* expected a contiguous \[8\]"):
        ops.contrastive_statistics(image, text, scale, torch.ones(7, device="cuda"), None, 0)


# PyTorch's own kernels have no PTX that this card could compile: nothing but copies and ours may run
FROM_PTX = """
import torch, clipfast.ops
from torch.nn.functional import logsigmoid, normalize
torch.manual_seed(0)
image, text = normalize(torch.randn(2, 300, 72, dtype=torch.float64), dim=-1).to(torch.bfloat16)
scale, bias = torch.tensor(20.0), torch.tensor(-3.0)
on_card = [x.cuda() for x in (image, text, scale, bias)]
found = torch.ops.clipfast.siglip_statistics(*on_card, None, None, 0).cpu()
signs = 2 * torch.eye(300, dtype=torch.float64) - 1
expected = -logsigmoid(signs * (20 * image.double() @ text.double().T - 3)).sum(1)
print("error", float((found - expected).abs().max() / expected.max()))
"""


def test_what_the_driver_compiles_from_ptx() -> None:
    capability = torch.cuda.get_device_capability()
    names = re.findall(r"\b(\d+)(\d)\+PTX", library.build_info()["cuda"])
    if not any((int(major), int(minor)) <= capability for major, minor in names):
        pytest.skip(f"no PTX for {capability} in {library.build_info()['cuda']}")
    # as a card without code in the library has it
    environment = os.environ | {"CUDA_FORCE_PTX_JIT": "1", "CUDA_CACHE_DISABLE": "1"}
    command = [sys.executable, "-c", FROM_PTX]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    # float32 sums of 300 terms
    assert float(done.stdout.split()[-1]) < 1e-5
