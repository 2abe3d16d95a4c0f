"""A stack carries each block's last addition into the next block's norm, and nobody who looks can tell."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_exact_as_reference, relative_error
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from clipfast import ops
from clipfast.modules import block as blocks_file
from clipfast.modules.block import ResidualAttentionBlock, SelfAttention
from clipfast.modules.transformer import Transformer

WIDTH, HEADS, LAYERS = 16, 2, 3
BOUND = 1e-12


@pytest.fixture(params=[False, True], ids=["each layer sums", "the norms sum"])
def norms_sum(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both plans for the gradients of biases; the second is that of the kernels, which have no float64."""
    if request.param:
        monkeypatch.setattr(blocks_file, "kernel_sums_bias_gradient", lambda *args: args[-1].requires_grad)
    return request.param


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the calls of LayerNorm's two ops, in their order."""
    called: list[str] = []
    for name in ("layer_norm", "add_layer_norm"):
        op = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *a, name=name, op=op: called.append(name) or op(*a))
    return called


def stack(causal: bool = False, dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(WIDTH, LAYERS, HEADS, causal=causal)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # no bias stays at zero, no norm at one
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype)


def tokens(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def written_out(block: nn.Module, x: Tensor, causal: bool) -> Tensor:
    """A block of ``[B, N, W]`` in plain PyTorch."""
    attn, mlp = block.attn, block.mlp
    y = F.layer_norm(x, (WIDTH,), block.ln_1.weight, block.ln_1.bias, block.ln_1.eps)
    query, key, value = F.linear(y, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    heads = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (query, key, value))
    y = F.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).flatten(2)
    x = x + F.linear(y, attn.out_proj.weight, attn.out_proj.bias)
    y = F.layer_norm(x, (WIDTH,), block.ln_2.weight, block.ln_2.bias, block.ln_2.eps)
    return x + F.linear(F.gelu(F.linear(y, mlp.c_fc.weight, mlp.c_fc.bias)), mlp.c_proj.weight, mlp.c_proj.bias)


def oracle(model: Transformer, x: Tensor, causal: bool = False) -> list[Tensor]:
    """What goes into the first block, and what comes out of each."""
    outputs = [x]
    for block in model.resblocks:
        outputs.append(written_out(block, outputs[-1], causal))
    return outputs


def results(model: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The output and all gradients."""
    leaf = x.detach().requires_grad_()
    wanted = {"x": leaf} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    out = run(leaf)
    weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out).to(out.dtype)
    found = torch.autograd.grad(out, list(wanted.values()), weights)
    return {"output": out.detach()} | dict(zip(wanted, found, strict=True))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= BOUND, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_against_blocks_written_out(causal: bool, checkpointing: bool, norms_sum: bool, norms: list[str]) -> None:
    model, x = stack(causal), tokens(3, 5)
    model.grad_checkpointing = checkpointing
    found = results(model, x, model)
    assert_same(found, results(model, x, lambda x: oracle(model, x, causal)[-1]))
    # one norm has nothing to add; a checkpointed block adds for itself, and is computed twice
    expected = ["layer_norm", "add_layer_norm"] * LAYERS * 2 if checkpointing else ["layer_norm"]
    assert norms == (expected if checkpointing else expected + ["add_layer_norm"] * (2 * LAYERS - 1))


def test_packed_and_read_at_one_token(norms_sum: bool) -> None:
    model, lengths = stack(causal=True), (4, 2, 7)
    x, ends = tokens(sum(lengths)), torch.tensor(lengths).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), ends])

    def one_by_one(x: Tensor) -> Tensor:
        return torch.cat([oracle(model, part[None], True)[-1][0] for part in x.split(lengths)])

    assert_same(results(model, x, lambda x: model(x, offsets)), results(model, x, one_by_one))
    read = results(model, x, lambda x: model(x, offsets, ends - 1))
    assert_same(read, results(model, x, lambda x: one_by_one(x)[ends - 1]))


FROZEN = ["in_proj_bias", "out_proj.bias", "c_proj.bias", "out_proj", "ln_", "resblocks.1", "attn", "bias", "resblocks"]


@pytest.mark.parametrize("part", FROZEN)
def test_frozen_parts(part: str, norms_sum: bool) -> None:
    model, x = stack(), tokens(2, 3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part not in name)
    assert_same(results(model, x, model), results(model, x, lambda x: oracle(model, x)[-1]))


def test_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_file, "kernel_sums_bias_gradient", lambda *args: True)
    model, x = stack(), tokens(2, 3)
    expected = results(model, x, model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(results(model, x, compiled), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_and_low_precision(dtype: torch.dtype, norms_sum: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = stack(dtype=torch.float32), tokens(3, 9).to(dtype)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    exact_model = stack()
    exact = results(exact_model, x.double(), lambda x: oracle(exact_model, x)[-1])
    fast = results(model, x, run)
    monkeypatch.setattr(Transformer, "_carries", lambda self, blocks: [False] * len(blocks))
    monkeypatch.setattr(blocks_file, "kernel_sums_bias_gradient", lambda *args: False)
    reference = results(model, x, run)
    for name, value in exact.items():
        assert_as_exact_as_reference(fast[name], reference[name], value, name, dtype=torch.bfloat16)


@pytest.mark.parametrize("wanted", [[0], [1], [0, 2], [0, 1, 2], [2], []])
@pytest.mark.parametrize("stop_early", [False, True])
def test_outputs_that_are_asked_for(wanted: list[int], stop_early: bool, norms_sum: bool) -> None:
    model, x = stack(), tokens(2, 3)
    expected = oracle(model, x)
    final, chosen = model.intermediates(x, wanted, stop_early=stop_early)
    last = 1 + (max(wanted, default=-1) if stop_early else LAYERS - 1)
    for i, found in zip([last, *(1 + i for i in wanted)], [final, *chosen], strict=True):
        assert relative_error(found, expected[i]) <= BOUND, i


Seen = list[Tensor]


def hook_output(model: Transformer, i: int, seen: Seen) -> None:
    model.resblocks[i].register_forward_hook(lambda m, args, out: seen.append(out))


def hook_input(model: Transformer, i: int, seen: Seen) -> None:
    model.resblocks[i].register_forward_pre_hook(lambda m, args: seen.append(args[0]))


def hook_norm(model: Transformer, i: int, seen: Seen) -> None:
    model.resblocks[i].ln_1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))


def patch_instance(model: Transformer, i: int, seen: Seen) -> None:
    forward = model.resblocks[i].forward
    model.resblocks[i].forward = lambda x, *rest: seen.append(x) or forward(x, *rest)


def replace_method(model: Transformer, i: int, seen: Seen) -> None:
    def forward(self: nn.Module, x: Tensor, *rest: object) -> Tensor:
        seen.append(x)
        return ResidualAttentionBlock.forward(self, x, *rest)

    model.resblocks[i].forward = types.MethodType(forward, model.resblocks[i])


def derive(model: Transformer, i: int, seen: Seen) -> None:
    class Derived(ResidualAttentionBlock):
        def forward(self, x: Tensor, *rest: object) -> Tensor:
            seen.append(x)
            return super().forward(x, *rest)

    model.resblocks[i].__class__ = Derived


def wrap(model: Transformer, i: int, seen: Seen) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return self.inner(x)

    model.resblocks[i] = Wrapper(model.resblocks[i])


def replace_norm(model: Transformer, i: int, seen: Seen) -> None:
    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x)
            return super().forward(x)

    norm = Norm(WIDTH).double()
    norm.load_state_dict(model.resblocks[i].ln_1.state_dict())
    model.resblocks[i].ln_1 = norm


def compile_block(model: Transformer, i: int, seen: Seen) -> None:
    call = model.resblocks[i]._call_impl
    model.resblocks[i]._compiled_call_impl = lambda x, *rest: seen.append(x) or call(x, *rest)


WATCHERS = [hook_output, hook_input, hook_norm, patch_instance, replace_method, derive, wrap, replace_norm]
WATCHERS += [compile_block]


@pytest.mark.parametrize("index", range(LAYERS))
@pytest.mark.parametrize("watch", WATCHERS)
def test_who_looks_at_a_block_sees_the_whole_stream(
    watch: Callable[[Transformer, int, Seen], None], index: int, norms_sum: bool
) -> None:
    model, x, seen = stack(), tokens(2, 3), []
    expected, stream = results(model, x, lambda x: oracle(model, x)[-1]), oracle(model, x)
    watch(model, index, seen)
    found = results(model, x, model)
    assert len(seen) == 1
    assert relative_error(seen[0], stream[index + (watch is hook_output)]) <= BOUND
    for actual, exact in zip(found.values(), expected.values(), strict=True):
        assert relative_error(actual, exact) <= BOUND


def parts_of(model: Transformer) -> Iterator[str]:
    yield from (name for name, _ in model.resblocks[1].named_modules())


@pytest.mark.parametrize("path", list(parts_of(stack())))
@pytest.mark.parametrize("kind", ["output", "gradient"])
def test_what_a_hook_changes_counts(path: str, kind: str, norms_sum: bool) -> None:
    """A hook on any module of a block has its say, in the output or in the gradients."""
    model, x = stack(), tokens(2, 3)
    plain = results(model, x, model)
    module = model.resblocks[1].get_submodule(path)
    if kind == "output":
        module.register_forward_hook(lambda m, args, out: 2 * out)
    else:
        module.register_full_backward_hook(lambda m, given, came: tuple(None if d is None else 2 * d for d in given))
    found = results(model, x, model)

    def called(x: Tensor) -> Tensor:
        for block in model.resblocks:
            y = block.attn(block.ln_1(x))
            z = x + y
            x = z + block.mlp(block.ln_2(z)) if block is not model.resblocks[1] or path else block(x)
        return x

    assert_same(found, results(model, x, called))
    assert any(relative_error(found[name], plain[name]) > 1e-3 for name in plain)


def test_a_hook_for_all_modules_sees_each(norms_sum: bool) -> None:
    model, seen = stack(), []
    handle = register_module_forward_hook(lambda m, args, out: seen.append(m))
    try:
        model(tokens(2, 3).requires_grad_())
    finally:
        handle.remove()
    assert {id(m) for m in seen} == {id(m) for m in model.modules() if not isinstance(m, nn.ModuleList)}


def test_a_part_that_gives_one_row_for_many(norms_sum: bool) -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
            return x.mean(1, keepdim=True)

    for part in ("attn", "mlp"):
        model, x = stack(), tokens(2, 3)
        setattr(model.resblocks[0], part, Mean())
        expected = x
        for block in model.resblocks:
            expected = expected + block.attn(block.ln_1(expected))
            expected = expected + block.mlp(block.ln_2(expected))
        assert relative_error(model(x.requires_grad_()), expected) <= BOUND


def test_an_attention_without_a_bias(norms_sum: bool) -> None:
    model, x = stack(), tokens(2, 3)
    for block in model.resblocks:
        del block.attn.in_proj_bias
        block.attn.in_proj_bias = None
    assert_same(results(model, x, model), results(model, x, lambda x: oracle(model, x)[-1]))


def test_a_patched_method_of_attention_is_called(monkeypatch: pytest.MonkeyPatch, norms_sum: bool) -> None:
    model, x = stack(), tokens(2, 3)
    forward = SelfAttention.forward
    monkeypatch.setattr(SelfAttention, "forward", lambda self, *args: 3 * forward(self, *args))
    expected = x
    for block in model.resblocks:
        expected = expected + 3 * forward(block.attn, block.ln_1(expected))
        expected = expected + block.mlp(block.ln_2(expected))
    assert relative_error(model(x.requires_grad_()), expected) <= BOUND


def test_symbolic_tracing_finds_the_blocks() -> None:
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, ResidualAttentionBlock)

    class Stack(Transformer):
        def forward(self, x: Tensor) -> Tensor:
            return self._through(list(self.resblocks), x)[0]

    model, x = stack(), tokens(2, 3)
    model.__class__ = Stack
    graph = Tracer().trace(model)
    assert [n.target for n in graph.nodes if n.op == "call_module"] == [f"resblocks.{i}" for i in range(LAYERS)]
    assert torch.equal(torch.fx.GraphModule(model, graph)(x), model(x))


def test_the_bias_gradients_of_a_block_take_one_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column sums over the tokens: only the queries' and, PyTorch adding the GELU's bias, that of the MLP's first."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sums(TorchDispatchMode):
        rows = 6

        def __init__(self) -> None:
            super().__init__()
            self.widths: list[int] = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.__name__.startswith("sum") and args[0].shape[:-1].numel() == self.rows:
                self.widths.append(args[0].shape[-1])
            return function(*args, **(kwargs or {}))

    counts = []
    for norms_sum in (False, True):
        monkeypatch.setattr(blocks_file, "kernel_sums_bias_gradient", lambda *args, norms_sum=norms_sum: norms_sum)
        model = stack()
        out = model(tokens(2, 3))
        with Sums() as mode:
            torch.autograd.grad(out, list(model.parameters()), torch.ones_like(out))
        counts.append(sorted(mode.widths))
    each, handed = counts
    assert each == sorted([WIDTH, WIDTH, 3 * WIDTH, 4 * WIDTH] * LAYERS)
    # here it is the reference that sums what the norms are handed: the widths of qkv alone are gone
    assert handed == sorted([WIDTH, WIDTH, WIDTH, 4 * WIDTH] * LAYERS)


def test_a_bias_that_no_norm_sums_after_all_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_file, "kernel_sums_bias_gradient", lambda *args: True)
    first, second = stack().resblocks[:2]
    leaf = tokens(2, 3).requires_grad_()
    x, branch = first.carry(leaf, None, following=second.ln_1)
    assert branch.bias is first.mlp.c_proj.bias
    found = torch.autograd.grad(branch.added_to(x).square().sum(), (leaf, *first.parameters()))
    expected = torch.autograd.grad(written_out(first, leaf, False).square().sum(), (leaf, *first.parameters()))
    for actual, exact in zip(found, expected, strict=True):
        assert relative_error(actual, exact) <= BOUND


def test_blocks_follow_each_other() -> None:
    """The oracle itself: one block's output is the next one's input."""
    model, x = stack(), tokens(2, 3)
    for block, (before, after) in zip(model.resblocks, pairwise(oracle(model, x)), strict=True):
        assert relative_error(block(before), after) <= BOUND
