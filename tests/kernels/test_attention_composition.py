"""Attention's kernels inside PyTorch's machinery: operator checks, compile, autocast, checkpoints, towers, graphs."""

from __future__ import annotations

import pytest
import torch
from interpreter import DEVICE
from oracle import assert_as_exact_as_reference
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import clipfast
from clipfast import ops
from clipfast.modules.block import ResidualAttentionBlock, SelfAttention

pytestmark = pytest.mark.usefixtures("triton_backend")


def drawn(*lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``[*lead, 3·2·32]``: two heads of 32."""
    return torch.randn(*lead, 192, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def offsets(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def gradients(function, qkv: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), leaf)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def dense(qkv: Tensor) -> Tensor:
    return ops.attention(qkv, 2)


def packed(qkv: Tensor) -> Tensor:
    return ops.attention(qkv, 2, causal=True, cu_seqlens=offsets(0, 3, qkv.shape[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_opcheck(is_packed: bool, dtype: torch.dtype) -> None:
    qkv = (
        drawn(9, dtype=dtype).unflatten(-1, (3, 2, 32))
        if is_packed
        else drawn(2, 9, dtype=dtype).unflatten(-1, (3, 2, 32))
    )
    options = (offsets(0, 3, 9) if is_packed else None, is_packed, 0.2)
    forward, backward = (torch.ops.clipfast.attention.default, torch.ops.clipfast.attention_backward.default)
    torch.library.opcheck(forward, (qkv, *options))
    out, lse = forward(qkv, *options)
    torch.library.opcheck(backward, (torch.ones_like(out), qkv, out, lse, *options))


@pytest.mark.parametrize("function", [dense, packed])
def test_compile_fullgraph(function) -> None:
    qkv = drawn(9) if function is packed else drawn(2, 9)
    compiled = torch.compile(function, fullgraph=True)
    assert_same(gradients(compiled, qkv), gradients(function, qkv))


def test_compile_with_dynamic_lengths() -> None:
    compiled = torch.compile(dense, fullgraph=True, dynamic=True)
    for tokens in (9, 17, 70):
        assert_same(gradients(compiled, drawn(2, tokens)), gradients(dense, drawn(2, tokens)))


def test_autocast() -> None:
    attention = SelfAttention(64, 2).to(DEVICE)
    x = torch.randn(2, 9, 64, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = attention(x)
    out.float().square().sum().backward()
    found = attention.in_proj_weight.grad.clone()
    assert out.dtype == torch.float16
    assert found.dtype == torch.float32
    attention.in_proj_weight.grad = None
    with torch.autocast(DEVICE, dtype=torch.float16), clipfast.backend("reference"):
        reference = attention(x)
        reference.float().square().sum().backward()
    torch.testing.assert_close(out, reference, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(found, attention.in_proj_weight.grad, rtol=5e-2, atol=5e-2)


def test_checkpointing() -> None:
    qkv = drawn(2, 9)
    recomputed = gradients(lambda x: checkpoint(dense, x, use_reentrant=False), qkv)
    assert_same(recomputed, gradients(dense, qkv))


def test_nothing_is_copied_between_the_projections() -> None:
    attention = SelfAttention(64, 2).to(DEVICE)
    x = torch.randn(2, 9, 64, device=DEVICE)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attention(x).sum().backward()
    called = [event.name for event in profile.events() if event.cpu_parent is None or "clipfast" in event.name]
    assert "clipfast::attention" in called
    assert "clipfast::attention_backward" in called
    inside = [e for e in profile.events() if e.name.startswith("clipfast::attention")]
    copies = {"aten::copy_", "aten::contiguous", "aten::clone", "aten::transpose"}
    for event in inside:
        # the interpreter itself copies its arguments; on a GPU the operator launches kernels and no more
        if DEVICE == "cuda":
            assert not copies & {child.name for child in event.cpu_children}
    # nothing of the kind between the projections either: linear transposes its weight, a view, and no more
    assert not {"aten::contiguous", "aten::clone"} & set(called)


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_as_exact_as_the_reference(causal: bool) -> None:
    torch.manual_seed(0)
    block = ResidualAttentionBlock(128, 2, causal=causal).to(DEVICE)
    x = torch.randn(2, 50, 128, device=DEVICE)

    def run(backend: str, dtype: torch.dtype) -> list[Tensor]:
        block.to(dtype).zero_grad()
        leaf = x.detach().to(dtype).requires_grad_()
        with clipfast.backend(backend):
            out = block(leaf)
            out.square().sum().backward()
        return [
            out.detach(),
            leaf.grad,
            block.attn.in_proj_weight.grad.clone(),
            block.attn.out_proj.weight.grad.clone(),
        ]

    oracle = run("reference", torch.float64)
    reference, fast = run("reference", torch.float32), run("triton", torch.float32)
    for what, a, b, c in zip(("output", "input", "in_proj", "out_proj"), fast, reference, oracle, strict=True):
        assert_as_exact_as_reference(a, b, c, what)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("tokens", [77, 257, 577])
def test_cuda_graph(tokens: int) -> None:
    qkv = drawn(4, tokens, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    static = qkv.clone().requires_grad_()
    with torch.cuda.stream(stream):
        expected = gradients(dense, qkv)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = dense(static)
        (found,) = torch.autograd.grad(out.float().square().sum(), static)
    with torch.no_grad():
        static.copy_(qkv)
    graph.replay()
    assert_same((out, found), expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_packed_cuda_graph() -> None:
    qkv = drawn(20, dtype=torch.float16)
    cu_seqlens = offsets(0, 3, 20)
    expected = packed(qkv)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(qkv, 2, causal=True, cu_seqlens=cu_seqlens)
    graph.replay()
    assert torch.equal(out, expected)
