"""The contrastive losses' ops on CUDA, against fp64 oracles in PyTorch."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_as_exact_as_reference
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


def by_formula(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the loss and its gradients by autograd, with logits in the dtype of ``scale``."""
    arguments = [x.detach().clone().requires_grad_() for x in (image, text, scale, *([] if bias is None else [bias]))]
    x = arguments[2] * (arguments[0].to(scale.dtype) @ arguments[1].to(scale.dtype).T)
    batch = image.shape[0]
    if bias is None:
        labels = torch.arange(batch, device=x.device)
        loss = (torch.nn.functional.cross_entropy(x, labels) + torch.nn.functional.cross_entropy(x.T, labels)) / 2
    else:
        z = 2 * torch.eye(batch, device=x.device, dtype=x.dtype) - 1
        loss = -torch.nn.functional.logsigmoid(z * (x + arguments[3])).sum() / batch
    return loss.detach(), *torch.autograd.grad(loss, arguments)


def check(image: Tensor, text: Tensor, scale: float, bias: float | None = None) -> None:
    batch, width = image.shape
    given = [scalar(scale), *([] if bias is None else [scalar(bias)])]
    fast = softmax(image, text, *given) if bias is None else siglip(image, text, *given)
    reference = by_formula(image, text, *given)
    oracle = by_formula(image.double(), text.double(), *[x.double() for x in given])
    largest = float(oracle[0].abs().clamp(min=1))
    # at width 1 half of the batch is alike, and what is summed is as large as the scale
    of_features = scale if width == 1 else scale / batch
    scales = (largest, of_features, of_features, largest, largest)
    for name, a, r, o, s in zip(
        ("loss", "d_image", "d_text", "d_scale", "d_bias"), fast, reference, oracle, scales, strict=False
    ):
        # a logit is off by units of rounding at its own size, and so is what is summed over logits
        noise = scale if name in ("loss", "d_scale", "d_bias") else 1.0
        assert_as_exact_as_reference(a, r, o, f"{name} at B={batch}, D={width}, {image.dtype}", s * max(1.0, noise))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), SHAPES)
def test_softmax(batch: int, width: int, dtype: torch.dtype) -> None:
    check(*features(batch, width, dtype), scale=100.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "width"), SHAPES)
def test_siglip(batch: int, width: int, dtype: torch.dtype) -> None:
    check(*features(batch, width, dtype), scale=10.0, bias=-10.0)


def test_float64() -> None:
    image, text = features(300, 48, torch.float64)
    for fast, oracle in zip(
        softmax(image, text, scalar(50.0, torch.float64)),
        by_formula(image, text, scalar(50.0, torch.float64)),
        strict=True,
    ):
        torch.testing.assert_close(fast, oracle, rtol=1e-10, atol=1e-12)


def test_rows_that_start_anywhere() -> None:
    wide = torch.nn.functional.normalize(torch.randn(130, 2 * 37 + 3, device="cuda"), dim=-1).to(torch.bfloat16)
    check(wide[:, 1:38], wide[:, 38:75], scale=30.0)


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
