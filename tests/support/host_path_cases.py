"""What the host waits for on a pretend card; ``tests/test_host_path.py`` runs these tests in a process of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pretend_card
import pytest
import torch
from functorch.compile import make_boxed_func
from host_path import (
    CARD,
    CONFIG,
    LENGTHS,
    SUBJECTS,
    assert_close,
    check,
    check_record,
    features,
    graph_waits,
    inputs_of,
    launch_kernels,
    made,
    on_card,
    results,
)
from oracle import assert_as_exact_as_reference, relative_error
from pretend_card import Record, watching
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

import clipfast
from clipfast.modules import packing
from clipfast.ops import attention_packed, attention_varlen, contrastive_kernels, fallback, kernel_ops

pytestmark = pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_eager(subject: str, checkpointing: bool) -> None:
    model = made(subject)
    if checkpointing:
        model.set_grad_checkpointing()
    check(subject, model)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("subject", ["CLIP", "SigLIP"])
def test_other_losses(subject: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "native":
        if contrastive_kernels.native is None:
            pytest.skip("the op library is not built")
        monkeypatch.setattr(contrastive_kernels, "native_devices", ("cpu", pretend_card.NAME))
    with clipfast.backend(backend):
        model = made(subject, torch.float32)
        record, actual = on_card(subject, model)
        check_record(subject, record, buckets=backend != "reference")
        if backend == "native":
            assert any("clipfast" in operator for operator in record.operators)
    assert_close(actual, results(model, inputs_of(subject, dtype=torch.float32)), 1e-3)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_without_shortcuts_and_gradients(subject: str) -> None:
    model = made(subject)
    with clipfast.exact_shortcuts(False):
        check_record(subject, on_card(subject, model)[0], packs=False)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            record, actual = on_card(subject, model.eval(), features)
            check_record(subject, record, draws=False)
            assert relative_error(actual["output"], model(inputs_of(subject))) <= 1e-10


@pytest.mark.parametrize("subject", SUBJECTS)
def test_autocast(subject: str) -> None:
    def cast(model: nn.Module, inputs: Any) -> dict[str, Tensor]:
        device = next(model.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            return results(model, inputs)

    model = made(subject, torch.float32)
    record, actual = on_card(subject, model, cast)
    check_record(subject, record)
    reference = cast(model, inputs_of(subject, dtype=torch.float32))
    oracle = results(made(subject), inputs_of(subject))
    # the card's autocast is a sketch of CUDA's, and the CPU's has rules of its own: their errors are of one size
    largest = max(float(value.norm()) for value in oracle.values())
    for name, value in oracle.items():
        assert actual[name].dtype == reference[name].dtype, name
        error, of_cpu = (float((found[name].double() - value).norm()) for found in (actual, reference))
        assert error <= 2 * of_cpu + 0.01 * max(float(value.norm()), 1e-3 * largest), name


@pytest.mark.parametrize("subject", ["ModifiedResNet", "loss", "SigLIP"])
def test_compiled(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # blocks are alike, and tracing is slow
    for tower in ("vision_cfg", "text_cfg"):
        monkeypatch.setitem(CONFIG[tower], "layers", 1)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model = made(subject)
    expected = results(model, inputs_of(subject))
    compiled = copy.deepcopy(model).to(CARD)
    compiled.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    inputs = inputs_of(subject, CARD)
    results(compiled, inputs)
    with watching() as record:
        found = results(compiled, inputs)
    assert len(graphs) == 2, "one graph forward and one backward"
    assert [graph_waits(graph) for graph in graphs] == [[], []]
    # captions are not packed, so that nothing is read; patches are drawn on the host all the same
    check_record(subject, record, packs=False)
    assert_close(found, expected, 1e-10)


def test_the_card_gets_offsets_once() -> None:
    packed = packing.pack(torch.zeros(5, 16, dtype=torch.int64, device=CARD), torch.tensor(LENGTHS, device=CARD) - 1)
    with watching() as record:
        offsets = [attention_packed.on_device(packed.cu_seqlens, CARD) for _ in range(3)]
    assert not record.operators
    assert all(there is offsets[0] for there in offsets)
    assert offsets[0].dtype == torch.int32
    assert offsets[0].tolist() == packed.cu_seqlens.tolist() == [0, 2, 6, 10, 19, 35]


PACKED = {"in order": [0, 2, 4, 9], "not in order": [0, 5, 7, 12, 14]}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offsets", PACKED.values(), ids=PACKED.keys())
def test_offsets_of_a_caller(offsets: list[int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(offsets[-1], 3, 2, 32, generator=generator, dtype=torch.float64)
    cu_seqlens = torch.tensor(offsets, dtype=dtype)
    for op in (_attend, _attend_once):
        expected = op(qkv, cu_seqlens)
        leaf = qkv.to(CARD)
        with watching() as record:
            actual = op(leaf, cu_seqlens)
        assert not record.waits, record.waits
        # what the buckets need goes there in one copy
        assert len(record.sends) == 1, record.sends
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a.cpu(), b) <= 1e-12


def _attend(qkv: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.clone().requires_grad_()
    out = clipfast.ops.attention(leaf, 2, causal=True, cu_seqlens=cu_seqlens)
    out.square().sum().backward()
    return out.detach(), leaf.grad


def _attend_once(qkv: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    leaf = qkv.flatten(2).clone().requires_grad_()
    query, key, value = leaf[: len(cu_seqlens) - 1, 0], leaf[:, 1], leaf[:, 2]
    out = clipfast.ops.single_query_attention(query, key, value, 2, cu_seqlens=cu_seqlens)
    out.square().sum().backward()
    return out.detach(), leaf.grad


@pytest.fixture
def varlen_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch's attention for sequences of any lengths serve calls on the card."""
    monkeypatch.setattr(attention_varlen, "_unavailable", lambda *where: None)


def launches(record: Record) -> list[str]:
    """Return the operators that launch something: not the views, and not what only takes memory."""
    free = {"aten.empty.memory_format", "aten.empty_like.default", "aten.empty_strided.default", "aten.detach.default"}

    def is_view(name: str) -> bool:
        packet, _, overload = name.removeprefix("aten.").rpartition(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
        returned = [r.alias_info for r in schema.returns]
        return any(alias is not None and not alias.is_write for alias in returned)

    return [name for name in record.operators if name not in free and not is_view(name)]


@pytest.mark.usefixtures("varlen_serves")
@pytest.mark.parametrize("offsets", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_in_a_few_launches(offsets: list[int], causal: bool) -> None:
    """FlashAttention's backward is three kernels in one operator: four launches with the stack of three gradients."""
    qkv = torch.randn(offsets[-1], 3, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    cu_seqlens = torch.tensor(offsets)
    leaf = qkv.to(CARD).requires_grad_()
    cotangent = torch.ones(offsets[-1], 64, dtype=torch.bfloat16).to(CARD)
    with watching() as forward:
        out = clipfast.ops.attention(leaf, 2, causal=causal, cu_seqlens=cu_seqlens)
    with watching() as backward:
        out.backward(cotangent)
    # the offsets go over once for all layers
    assert launches(forward) == ["aten._copy_from.default", "aten._flash_attention_forward.default"]
    assert launches(backward) == ["aten._flash_attention_backward.default", "aten.cat.default"]
    assert not forward.waits + backward.waits


@pytest.mark.usefixtures("varlen_serves")
@pytest.mark.parametrize("on_host", [False, True], ids=["on the card", "on the host"])
@pytest.mark.parametrize("known", [True, False], ids=["operator", "varlen_attn"])
def test_varlen(on_host: bool, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        if attention_varlen._function() is None:
            pytest.skip("PyTorch has no varlen_attn")
        monkeypatch.setattr(attention_varlen, "_operator", lambda: None)
    model = made("text", torch.bfloat16)
    record, actual = on_card("text", model, on_host=on_host)
    check_record("text", record, buckets=False, on_host=on_host)
    assert record.operators.count("aten._flash_attention_forward.default") == 3, "one a layer"
    with clipfast.backend("reference"):
        reference, oracle = results(model, inputs_of("text")), results(made("text"), inputs_of("text"))
    for name, value in oracle.items():
        assert_as_exact_as_reference(actual[name], reference[name], value, name)
    with clipfast.deterministic(), torch.no_grad():
        again, _ = on_card("text", model, features)
    assert "aten._flash_attention_forward.default" not in again.operators


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if SUBJECTS[name].packs])
def test_nothing_waits_for_captions_in_host_memory(subject: str) -> None:
    model = made(subject)
    record, actual = on_card(subject, model, on_host=True)
    check_record(subject, record, on_host=True)
    assert_close(actual, results(model, inputs_of(subject)), 1e-10)
    # whole captions go over in one copy too
    with clipfast.exact_shortcuts(False), torch.no_grad():
        record, actual = on_card(subject, model.eval(), features, on_host=True)
    assert not record.waits
    assert len(record.sends) == 1


@pytest.fixture
def kernels_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's kernels serve calls on the card."""
    pytest.importorskip("triton")
    launch_kernels()
    monkeypatch.setattr(kernel_ops, "refusal", lambda *tensors: None)


@pytest.mark.usefixtures("kernels_serve")
@pytest.mark.parametrize(("subject", "checkpointing"), [("ViT", False), ("text", True)])
def test_kernels(subject: str, checkpointing: bool) -> None:
    model = made(subject, torch.float32)
    inputs = inputs_of(subject, dtype=torch.float32)
    with clipfast.backend("reference"):
        reference, oracle = results(model, inputs), results(made(subject), inputs_of(subject))
    model.set_grad_checkpointing(checkpointing)
    with clipfast.backend("triton"):
        record, actual = on_card(subject, model)
    check_record(subject, record)
    assert not fallback.failures()
    launched = {operator for operator in record.operators if "." not in operator}
    assert len(launched) >= 6, launched
    for name, value in oracle.items():
        assert_as_exact_as_reference(actual[name], reference[name], value, name)
