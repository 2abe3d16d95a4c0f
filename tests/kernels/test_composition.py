"""The ops with kernels inside PyTorch's machinery: operator checks, compile, autocast, checkpoints, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import clipfast
from clipfast import ops
from clipfast.modules.block import MLP

pytestmark = pytest.mark.usefixtures("triton_backend")


def drawn(rows: int = 6, width: int = 64, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return x, residual, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, width), (rows, width), (width,), (width,))
    return tuple(torch.randn(s, generator=generator).to(DEVICE, dtype) for s in shapes)


def everything(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Use all three ops."""
    y, stream = ops.add_layer_norm(x, residual, weight, bias)
    return ops.bias_gelu(ops.layer_norm(y, weight, bias), bias, "quick") + ops.bias_gelu(stream, None)


def gradients(function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output.float().square().sum(), leaves)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def operator_calls() -> list[tuple[str, tuple]]:
    x, residual, weight, bias = drawn()
    mean, rstd = drawn(1, 6)[:2]
    statistics = mean[0], rstd[0]
    return [
        ("layer_norm_forward", (x, weight, bias, 1e-5)),
        ("layer_norm_backward", (x, residual, weight, *statistics)),
        ("add_layer_norm_forward", (x, residual, weight, bias, 1e-5)),
        ("add_layer_norm_forward", (x.half(), residual, weight, bias, 1e-5)),
        ("add_layer_norm_backward", (x, x, residual, weight, *statistics, torch.float32, torch.float32)),
        ("add_layer_norm_backward", (x, x, residual, weight, *statistics, torch.float16, torch.float32)),
        ("add_layer_norm_backward", (x, x, residual, weight, *statistics, *[torch.float32] * 2, torch.float16)),
        ("bias_gelu_forward", (x, bias, "none")),
        ("bias_gelu_forward", (x, None, "tanh")),
        ("bias_gelu_backward", (residual, x, bias, "quick")),
        ("bias_gelu_backward", (residual, x, None, "none")),
    ]


@pytest.mark.parametrize("case", range(len(operator_calls())), ids=[name for name, _ in operator_calls()])
def test_opcheck(case: int) -> None:
    name, arguments = operator_calls()[case]
    torch.library.opcheck(getattr(torch.ops.clipfast, name).default, arguments)


def test_compile_fullgraph() -> None:
    inputs = drawn()
    compiled = torch.compile(everything, fullgraph=True)
    assert_same(gradients(compiled, inputs), gradients(everything, inputs))
    # a change of the backend recompiles, and does not keep what was chosen first
    with clipfast.backend("reference"):
        reference = gradients(everything, inputs)
        found = gradients(compiled, inputs)
    for a, b in zip(found, reference, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_dynamic_rows() -> None:
    compiled = torch.compile(everything, fullgraph=True, dynamic=True)
    for rows in (6, 9, 20):
        assert_same(gradients(compiled, drawn(rows)), gradients(everything, drawn(rows)))


def test_autocast() -> None:
    mlp = MLP(64, 128).to(DEVICE)
    x, residual, weight, bias = drawn()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        hidden = ops.layer_norm(torch.nn.functional.linear(x, torch.eye(64, device=DEVICE)), weight, bias)
        y, stream = ops.add_layer_norm(hidden, residual, weight, bias)
        out = mlp(y)
    assert hidden.dtype == out.dtype == torch.bfloat16
    # the stream keeps its float32
    assert y.dtype == stream.dtype == torch.float32
    out.float().sum().backward()
    assert mlp.c_fc.bias.grad.dtype == torch.float32
    with torch.autocast(DEVICE, dtype=torch.bfloat16), clipfast.backend("reference"):
        reference = mlp(y)
    torch.testing.assert_close(out, reference, rtol=0.02, atol=0.02)


def test_checkpointing() -> None:
    inputs = drawn()
    recomputed = gradients(lambda *args: checkpoint(everything, *args, use_reentrant=False), inputs)
    assert_same(recomputed, gradients(everything, inputs))


def test_the_towers_hand_over_the_bias_where_a_kernel_adds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = MLP(64, 128).to(DEVICE)
    biases = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda x, w, b=None: biases.append(b is not None) or linear(x, w, b)
    )
    mlp(drawn()[0])
    with clipfast.backend("reference"):
        mlp(drawn()[0])
    # c_fc without and c_proj with its bias; then both with theirs
    assert biases == [False, True, True, True]


def test_a_hooked_or_changed_layer_is_called() -> None:
    x, seen = drawn()[0], []
    mlp = MLP(64, 128).to(DEVICE)
    plain = mlp(x)
    mlp.c_fc.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    torch.testing.assert_close(mlp(x), plain)
    assert seen == [(6, 128)]
    torch.nn.utils.parametrizations.weight_norm(mlp.c_fc)
    torch.testing.assert_close(mlp(x), plain)
    assert len(seen) == 2


@pytest.mark.gpu
def test_cuda_graph_capture() -> None:
    inputs = [t.requires_grad_() for t in drawn(dtype=torch.bfloat16)]

    def step() -> tuple[Tensor, ...]:
        output = everything(*inputs)
        return output.detach(), *torch.autograd.grad(output.float().square().sum(), inputs)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()  # kernels are built before anything is captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].mul_(2)
    graph.replay()
    assert_same(captured, step())


@pytest.mark.gpu
def test_the_device_of_the_tensors_is_used() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    inputs = tuple(t.to("cuda:1") for t in drawn())
    assert_same([t.cpu() for t in gradients(everything, inputs)], [t.cpu() for t in gradients(everything, drawn())])
