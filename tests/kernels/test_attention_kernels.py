"""Attention's kernels against fp64 by the rule of docs/numerics.md: every length, mask, head_dim, layout and guard."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from guarded import GuardedMemory, inside_nan
from interpreter import DEVICE
from oracle import assert_as_exact_as_reference
from torch import Tensor

import clipfast
from clipfast import ops
from clipfast.kernels import attention as kernels
from clipfast.kernels import attention_policy as policy

pytestmark = pytest.mark.usefixtures("triton_backend")

LENGTHS = (1, 7, 50, 64, 77, 130, 197, 257, 577, 1024)
# 577 and 1024 tokens again, with fewer tiles: a class token beside tiles that stream, and such tiles alone
SHORT_LENGTHS = (*LENGTHS[:-2], 321, 384)
HEAD_DIMS = range(32, 129, 8)
# of each padded width one that is whole and ones that are not
SOME_HEAD_DIMS = (32, 40, 64, 72, 128)
NAMES = ("query", "key", "value")


def drawn(*lead: int, heads: int = 2, head_dim: int = 64, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Return ``[*lead, 3, heads, head_dim]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, 3, heads, head_dim, generator=generator).to(DEVICE, dtype)


def results(qkv: Tensor, grad: Tensor, keep_strides: bool = False, **options: object) -> dict[str, Tensor]:
    """Return the output and the gradients of queries, keys and values."""
    leaf = (qkv.detach() if keep_strides else qkv.detach().clone()).requires_grad_()
    out = ops.attention(leaf, qkv.shape[-2], **options)
    (found,) = torch.autograd.grad(out, leaf, grad)
    parts = {f"gradient of {name}": part for name, part in zip(NAMES, found.unbind(-3), strict=True)}
    return {"output": out.detach()} | parts


def check(qkv: Tensor, grad: Tensor | None = None, **options: object) -> dict[str, Tensor]:
    if grad is None:
        grad = drawn(*qkv.shape[:-3], heads=qkv.shape[-2], head_dim=qkv.shape[-1], dtype=qkv.dtype, seed=1)
        grad = grad[..., 0, :, :].flatten(-2)
    fast = results(qkv, grad, keep_strides=True, **options)
    with clipfast.backend("reference"):
        reference = results(qkv, grad, **options)
        oracle = results(qkv.double(), grad.double(), **options)
    for name, value in fast.items():
        assert_as_exact_as_reference(value, reference[name], oracle[name], name)
    return fast


@pytest.fixture
def tensor_core_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run fp32 through the kernels and tiles of half precision: its errors are too small for a mistake to hide in."""
    for name in ("forward_plan", "backward_plan"):
        original = getattr(policy, name)
        monkeypatch.setattr(
            policy, name, lambda a, tokens, d, size, causal, f=original: f(a, tokens, d, 2, causal)
        )  # fmt: skip


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", SHORT_LENGTHS)
def test_float32_in_the_tiles_of_half_precision(tokens: int, causal: bool, tensor_core_plans: None) -> None:
    check(drawn(2 if tokens < 300 else 1, tokens), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", SHORT_LENGTHS)
def test_float16(tokens: int, causal: bool) -> None:
    head_dim = HEAD_DIMS[3 * SHORT_LENGTHS.index(tokens) % 13]
    heads = 2 if tokens < 300 else 1
    check(drawn(1, tokens, heads=heads, head_dim=head_dim, dtype=torch.float16), causal=causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 64, 77, 130, 257])
def test_float32(tokens: int, causal: bool) -> None:
    head_dim = HEAD_DIMS[-1 - tokens % 13]
    check(drawn(1, tokens, heads=2, head_dim=head_dim), causal=causal)


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    # the mask of a padded head is the same code in both
    [(torch.float16, d) for d in HEAD_DIMS] + [(torch.float32, d) for d in SOME_HEAD_DIMS],
    ids=str,
)
def test_head_dims(head_dim: int, dtype: torch.dtype) -> None:
    offsets = torch.tensor([0, 1, 1, 40], dtype=torch.int32, device=DEVICE)
    check(drawn(1, 40, heads=2, head_dim=head_dim, dtype=dtype))
    check(drawn(1, 77, heads=2, head_dim=head_dim, dtype=dtype), causal=True)
    check(drawn(40, heads=2, head_dim=head_dim, dtype=dtype), cu_seqlens=offsets)


@pytest.mark.parametrize("head_dim", SOME_HEAD_DIMS)
@pytest.mark.parametrize("tokens", [257, 321])
def test_head_dims_beside_a_class_token(tokens: int, head_dim: int, tensor_core_plans: None) -> None:
    check(drawn(1, tokens, heads=1, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", [40, 72, 104])
def test_heads_whose_rows_are_no_multiples_of_32_bytes(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # what lies beside a head is another head, and behind the last nothing
    memory = GuardedMemory(monkeypatch)
    for offsets in (None, torch.tensor([0, 9, 33], dtype=torch.int32, device=DEVICE)):
        lead = (33,) if offsets is not None else (1, 33)
        qkv = drawn(*lead, heads=3, head_dim=head_dim, dtype=torch.float16)
        found = results(qkv, qkv[..., 0, :, :].flatten(-2), cu_seqlens=offsets)
        assert all(value.isfinite().all() for value in found.values())
    memory.check()


@pytest.mark.exhaustive
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_combination(dtype: torch.dtype, tokens: int, head_dim: int, causal: bool) -> None:
    check(drawn(1, tokens, heads=1, head_dim=head_dim, dtype=dtype), causal=causal)


def other_plans() -> list[tuple[int, int, bool, int]]:
    """Calls whose tiles on an architecture are not those of another that comes before; warps change nothing here."""
    found, calls = {}, [(77, True, 64), (77, False, 128), (197, False, 64)]
    for tokens, causal, head_dim in [*calls, (257, False, 64), (257, True, 64), (257, False, 128)]:
        for architecture in (90, 80, 86, 100):
            call = architecture, tokens, head_dim, 2, causal
            backward = policy.backward_plan(*call)
            plans = [policy.forward_plan(*call), *(backward if isinstance(backward, tuple) else [backward])]
            tiles = tuple(replace(plan, warps=0, stages=0) for plan in plans)
            found.setdefault((tokens, causal, head_dim, tiles), (architecture, tokens, causal, head_dim))
    return [call for call in found.values() if call[0] != 90]


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has one architecture")
@pytest.mark.parametrize(("architecture", "tokens", "causal", "head_dim"), other_plans())
def test_other_architectures(
    architecture: int,
    tokens: int,
    causal: bool,
    head_dim: int,
    tensor_core_plans: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "_architecture", lambda device: architecture)
    check(drawn(1, tokens, heads=1, head_dim=head_dim), causal=causal)


def test_plans_are_of_the_kinds_they_should_be() -> None:
    # head_dim 64 on Hopper: one kernel each way up to 257 tokens, the class token beside 256; two kernels back beyond
    for tokens in range(1, 257):
        for plan in (policy.forward_plan(90, tokens, 64, 2, False), policy.backward_plan(90, tokens, 64, 2, True)):
            assert isinstance(plan, policy.Whole)
            assert not plan.class_token
    assert policy.forward_plan(90, 257, 64, 2, False).class_token
    assert policy.backward_plan(90, 257, 64, 2, False).class_token
    assert isinstance(policy.forward_plan(90, 257, 64, 2, True), policy.Streaming)
    assert policy.backward_plan(90, 577, 64, 2, False)[0].class_token
    assert not policy.backward_plan(90, 578, 64, 2, False)[0].class_token
    assert isinstance(policy.forward_plan(90, None, 64, 2, True), policy.Streaming)


@pytest.mark.parametrize("architecture", [80, 86, 90, 100])
def test_every_class_of_calls_has_a_plan(architecture: int) -> None:
    for head_dim, size, causal in itertools.product(HEAD_DIMS, (2, 4), (False, True)):
        for tokens in (None, *range(1, 300), 577, 5000):
            forward = policy.forward_plan(architecture, tokens, head_dim, size, causal)
            backward = policy.backward_plan(architecture, tokens, head_dim, size, causal)
            for plan in (forward, *(backward if isinstance(backward, tuple) else (backward,))):
                if isinstance(plan, policy.Whole):
                    assert plan.holds(tokens, causal)
                elif plan.class_token:
                    assert not causal
                    assert (tokens - 1) % plan.keys == (tokens - 1) % plan.queries == 0


def test_cards_get_the_tables_that_fit_their_shared_memory() -> None:
    with_99_kb = [(8, 6), (8, 9), (12, 0), (12, 1)]
    assert {policy.architecture(capability) for capability in with_99_kb} == {86}
    # nothing is known of these, or nothing that more than 99 KB would be needed for
    assert {policy.architecture(capability) for capability in [(8, 8), (11, 0), (13, 0)]} == {86}
    known = {(8, 0): 80, (8, 7): 80, (9, 0): 90, (10, 0): 100, (10, 3): 100}
    assert all(policy.architecture(capability) == name for capability, name in known.items())


@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0, -0.0, 2.0])
@pytest.mark.parametrize("tiles", ["of float32", "of half precision"])
def test_scale(scale: float, tiles: str, request: pytest.FixtureRequest) -> None:
    if tiles == "of half precision":
        request.getfixturevalue("tensor_core_plans")
        check(drawn(1, 33), scale=scale)
        check(drawn(1, 257, heads=1), scale=scale)
    qkv = drawn(1, 77, heads=1, head_dim=32)
    if tiles == "of float32":
        check(qkv, scale=scale)
        check(qkv, causal=True, scale=scale)
        check(qkv[0], causal=True, cu_seqlens=torch.tensor([0, 9, 77], dtype=torch.int32, device=DEVICE), scale=scale)
    # scores of both signs up to 3,000: the largest of a row must be found before any exponent is taken
    grad = torch.ones(1, 77, 32, device=DEVICE)
    assert all(value.isfinite().all() for value in results(10 * qkv, grad, causal=True, scale=scale).values())


def test_a_scale_that_is_no_number() -> None:
    assert ops.attention(drawn(1, 9), 2, scale=math.nan).isnan().all()


def test_scores_far_from_zero(tensor_core_plans: None) -> None:
    # the largest score of a row comes last, and no weight may overflow before it
    qkv = drawn(1, 77)
    qkv[:, :, :2] *= torch.linspace(1, 20, 77, device=DEVICE)[:, None, None, None]
    assert all(value.isfinite().all() for value in check(qkv, causal=True).values())
    assert all(value.isfinite().all() for value in check(-qkv).values())


@pytest.mark.parametrize(("tokens", "head_dim"), [(33, 64), (197, 64), (257, 64), (300, 64), (77, 80), (300, 104)])
def test_nothing_beside_the_tokens_is_read_or_written(
    tokens: int, head_dim: int, tensor_core_plans: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = inside_nan(drawn(1, tokens, heads=2, head_dim=head_dim).flatten(2)).unflatten(-1, (3, 2, head_dim))
    grad = drawn(1, tokens, heads=2, head_dim=head_dim, seed=1)[:, :, 0].flatten(2)
    check(qkv, grad)
    memory = GuardedMemory(monkeypatch)
    found = results(qkv, inside_nan(grad), keep_strides=True)
    memory.check()
    assert not any(value.isnan().any() for value in found.values())


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a slice of wider rows": lambda x: torch.cat([x.flatten(2), x.flatten(2)[..., :4]], -1)[
        ..., : x[0, 0].numel()
    ].unflatten(-1, x.shape[2:]),
    "every other token": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
    "parts first": lambda x: x.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4),
    "heads first": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "columns apart": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one head for all": lambda x: x[:, :, :, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    qkv = drawn(2, 21, head_dim=80, dtype=torch.float16)
    view = LAYOUTS[layout](qkv)
    assert not view.is_contiguous()
    packed = view.contiguous()
    grad = drawn(2, 21, head_dim=80, dtype=torch.float16, seed=1)[:, :, 0].flatten(2)
    for name, value in results(view, grad, keep_strides=True).items():
        assert torch.equal(value, results(packed, grad)[name]), name


def test_a_gradient_of_any_layout() -> None:
    qkv = drawn(2, 9)
    grad = torch.ones((), device=DEVICE).expand(2, 9, 128)
    for name, value in results(qkv, grad).items():
        assert torch.equal(value, results(qkv, grad.contiguous())[name]), name


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("index", "dtype"), [(torch.int32, torch.float16), (torch.int64, torch.float32)], ids=str)
def test_packed_sequences(
    index: torch.dtype, causal: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = torch.tensor([0, 3, 1, 70, 0, 64, 1, 0])
    offsets = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(DEVICE, index)
    qkv = inside_nan(drawn(int(offsets[-1]), dtype=dtype).flatten(1)[None])[0].unflatten(-1, (3, 2, 64))
    check(qkv, causal=causal, cu_seqlens=offsets)
    memory = GuardedMemory(monkeypatch)
    found = results(qkv, drawn(len(qkv), dtype=dtype)[:, 0].flatten(1), True, causal=causal, cu_seqlens=offsets)
    memory.check()
    assert not any(value.isnan().any() for value in found.values())


def test_packed_sequences_in_the_tiles_of_half_precision(tensor_core_plans: None) -> None:
    offsets = torch.tensor([0, 3, 3, 73, 203], dtype=torch.int32, device=DEVICE)
    for causal in (False, True):
        check(drawn(203, heads=1), causal=causal, cu_seqlens=offsets)


def test_offsets_on_a_device_lead_nowhere_else() -> None:
    # such offsets are an error in host memory; on a device nobody can look, and nothing may be touched beside tensors
    qkv = inside_nan(drawn(20).flatten(1)[None])[0].unflatten(-1, (3, 2, 64))
    for offsets in ([-5, 4, 99], [7, 3, 20], [30, 40, 50]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        out, lse = kernels.forward(qkv, cu_seqlens, True, 0.1)
        kernels.backward(torch.ones_like(out), qkv, out, lse, cu_seqlens, True, 0.1)


@pytest.mark.parametrize("tokens", [64, 257, 300])
def test_an_empty_batch(tokens: int) -> None:
    qkv = drawn(0, tokens)
    found = results(qkv, qkv[:, :, 0].flatten(2))
    assert found["output"].shape == (0, tokens, 128)
    assert found["gradient of key"].shape == (0, tokens, 2, 64)


def test_no_packed_tokens() -> None:
    for offsets in ([0], [0, 0, 0]):
        cu_seqlens = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        found = results(drawn(0), drawn(0)[:, 0].flatten(1), cu_seqlens=cu_seqlens)
        assert found["output"].shape == (0, 128)


@pytest.mark.parametrize(("tokens", "causal"), [(77, True), (197, False), (257, False), (321, False)])
def test_bitwise_the_same_twice_in_any_batch_and_by_any_number_of_programs(
    tokens: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qkv = drawn(3, tokens, heads=1, dtype=torch.float16)
    grad = drawn(3, tokens, heads=1, dtype=torch.float16, seed=1)[:, :, 0].flatten(2)
    first, second = results(qkv, grad, causal=causal), results(qkv, grad, causal=causal)
    monkeypatch.setattr(kernels, "_multiprocessors", lambda device: 100)
    alone = results(qkv[1:2], grad[1:2], causal=causal)
    for name, value in first.items():
        assert torch.equal(second[name], value), name
        assert torch.equal(alone[name], value[1:2]), name


def test_a_packed_sequence_does_not_depend_on_its_neighbours() -> None:
    qkv, grad = drawn(90, dtype=torch.float16), drawn(90, dtype=torch.float16, seed=1)[:, 0].flatten(1)
    options = {"causal": True, "cu_seqlens": torch.tensor([0, 13, 83, 90], dtype=torch.int32, device=DEVICE)}
    together = results(qkv, grad, **options)
    options["cu_seqlens"] = torch.tensor([0, 70], dtype=torch.int32, device=DEVICE)
    for name, value in results(qkv[13:83], grad[13:83], **options).items():
        assert torch.equal(value, together[name][13:83]), name


def far_apart(values: Tensor, dim: int, stride: int) -> Tensor:
    """Return a contiguous tensor as a view with another stride in one dimension; the memory between is never taken."""
    strides = [s if i != dim else stride for i, s in enumerate(values.stride())]
    reach = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
    assert reach > 2**31
    view = torch.empty(reach, dtype=values.dtype, device=values.device).as_strided(values.shape, strides)
    return view.copy_(values)


@pytest.mark.skipif(DEVICE == "cuda", reason="takes the memory between the elements on a GPU")
@pytest.mark.parametrize(
    ("shape", "dim", "stride", "dtype"),
    [
        ((3, 7), 0, 2**30 + 16, torch.float16),
        ((3, 7), 0, 2**30 + 16, torch.float32),
        ((2, 7), 2, 2**30 + 16, torch.float16),
        ((2, 7), 2, 2**30 + 16, torch.float32),
        ((2, 7), 3, 2**31 + 16, torch.float16),
        ((520,), 0, 2**22, torch.float16),
    ],
    ids=["sequences", "sequences, streaming", "parts", "parts, streaming", "heads", "packed tokens"],
)
def test_offsets_beyond_32_bits(shape: tuple[int, ...], dim: int, stride: int, dtype: torch.dtype) -> None:
    # of packed tokens the last tile of a long sequence is beyond; the mask and one head spare half and half of its time
    packed = len(shape) == 1
    options = {"dtype": dtype, "heads": 1 if packed else 2, "head_dim": 32}
    qkv = drawn(*shape, **options)
    grad = drawn(*shape, **options, seed=1)[..., 0, :, :].flatten(-2)
    cu_seqlens = torch.tensor([0, 3, 520], dtype=torch.int32) if packed else None
    far = far_apart(qkv, dim, stride)
    # in place: a copy would hide the offsets
    assert kernels._readable(far) is far
    out, lse = kernels.forward(far, cu_seqlens, packed, 0.2)
    near_out, near_lse = kernels.forward(qkv, cu_seqlens, packed, 0.2)
    assert torch.equal(out, near_out)
    found = kernels.backward(grad, far, out, lse, cu_seqlens, packed, 0.2)
    assert torch.equal(found, kernels.backward(grad, qkv, near_out, near_lse, cu_seqlens, packed, 0.2))


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's arithmetic of bfloat16 is not that of the hardware")
@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_bfloat16(tokens: int, head_dim: int, causal: bool) -> None:
    check(drawn(3, tokens, head_dim=head_dim, dtype=torch.bfloat16), causal=causal)


@pytest.mark.skipif(DEVICE == "cuda", reason="for the interpreter")
@pytest.mark.parametrize("tokens", [77, 257])
def test_bfloat16_roughly(tokens: int) -> None:
    # the interpreter truncates where the hardware rounds: the kernels' arithmetic is seen, its precision is not
    qkv, grad = drawn(1, tokens, heads=1), drawn(1, tokens, heads=1, seed=1)[:, :, 0].flatten(2)
    qkv, grad = qkv.bfloat16(), grad.bfloat16()
    fast = results(qkv, grad)
    with clipfast.backend("reference"):
        oracle = results(qkv.double(), grad.double())
    for name, value in fast.items():
        error = (value.double() - oracle[name]).abs().max() / oracle[name].abs().max()
        assert error < 0.05, f"{name}: {error}"


def test_refusals_name_the_reason() -> None:
    for qkv, reason in (
        (drawn(1, 5, head_dim=24), "head_dim 24 is not served (multiples of 8 from 32 to 128 are)"),
        (drawn(1, 5, head_dim=36), "head_dim 36 is not served"),
        (drawn(1, 5, head_dim=136), "head_dim 136 is not served"),
        (drawn(1, 5).double(), "float64 is not served"),
    ):
        assert reason in clipfast.explain("attention", qkv, 2)
    with pytest.warns(ops.FallbackWarning, match="head_dim 44 is not served"):
        out = ops.attention(drawn(1, 5, head_dim=44), 2)
    with clipfast.backend("reference"):
        torch.testing.assert_close(out, ops.attention(drawn(1, 5, head_dim=44), 2))
    # unmeasured, so forced or not at all
    with clipfast.backend("auto"):
        assert "not triton" in clipfast.explain("attention", drawn(1, 5), 2)
    assert clipfast.explain("attention", drawn(1, 5), 2).startswith("attention: triton")
