"""The contrastive losses' ops on CUDA, against fp64 oracles in PyTorch."""

from __future__ import annotations

import pytest
import torch
from contrastive_oracle import LOSSES, compare
from torch import Tensor

from clipfast.ops import library

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
    return row_loss.mean(), *ops.siglip_gradients(image, text, scale, bias, None, None, weight, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_against_fp64(name: str, batch: int, width: int, dtype: torch.dtype) -> None:
    compare(name, "native", *features(batch, width, dtype), scale=100.0)


@pytest.mark.parametrize("name", LOSSES)
def test_float64(name: str) -> None:
    compare(name, "native", *features(300, 48, torch.float64), scale=50.0)


def test_rows_that_start_anywhere() -> None:
    wide = torch.nn.functional.normalize(torch.randn(130, 2 * 37 + 3, device="cuda"), dim=-1).to(torch.bfloat16)
    compare("contrastive", "native", wide[:, 1:38], wide[:, 38:75], scale=30.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_the_same_twice(dtype: torch.dtype) -> None:
    image, text = features(1000, 512, dtype)
    for run in (lambda: softmax(image, text, scalar(100.0)), lambda: siglip(image, text, scalar(10.0), scalar(-10.0))):
        assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


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
    # the features themselves are 4 · B · D bytes
    peak = torch.cuda.max_memory_allocated() - before + 4 * batch * width
    assert peak <= 12 * batch * width + (64 << 20)


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
