"""The rule: its reckonings, its table, and keys that do not depend on the batch where nothing may."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import clipfast
from clipfast.models.config import get_config
from clipfast.ops import dispatch, keys, registry, rules
from clipfast.ops.call_classes import LARGE, Key, Machine
from clipfast.ops.contrastive_arguments import Options
from clipfast.ops.encoder import BlockWeights, PackedEncoder

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "rule_table.py"
KERNELS = ("layer_norm", "add_layer_norm", "bias_gelu", "attention")


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("rule_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_entry_is_without_its_reckoning() -> None:
    for rule in rules.RULES:
        about = f"{rule.ops}, {rule.backend}"
        assert len(rule.reckoning) > 40, about
        assert re.search(r"\d", rule.reckoning), f"{about}: no number"
        assert rule.says, about
        assert len(rule.says) < 120, about
        for op in set(rule.ops) & set(dispatch.operations()):
            assert rule.backend in dispatch.plannable(op), about


def test_every_entry_decides_something(script: Any) -> None:
    deciding = set()
    # a card that nothing is known of too
    machines = [Machine("cuda", c) for c in (*script.CAPABILITIES, (10, 3))]
    machines += [Machine("cpu"), Machine("cpu", amx=True), Machine("cpu", amx=True, native_amx=True)]
    machines += [Machine("cpu", arm=True), Machine("xpu")]
    for machine in machines:
        for precision in script.PRECISIONS:
            for training in (False, True):
                keys = list(script.keys_of(get_config("ViT-B-32"), precision, training).values())
                keys += [key._replace(compiled=True) for key in keys if key.op != "attention"]
                keys += [key._replace(large=False) for key in keys]
                keys += [Key("encoder", (precision,)), Key("single_query_attention", (precision,))]
                deciding |= {id(rules.rule_for(key, machine)) for key in keys}
    assert deciding == {id(rule) for rule in rules.RULES}


def test_every_op_has_an_entry_for_every_call() -> None:
    for op in dispatch.operations():
        assert rules.RULES[-1].ops
        assert rules.decide(Key(op, ("complex64",)), Machine("mps")).backend in dispatch.plannable(op)
    with pytest.raises(LookupError, match="no rule is about 'conv'"):
        rules.rule_for(Key("conv", ("float32",)), Machine("cpu"))


def test_the_table_in_the_docs_is_that_of_the_rule(script: Any) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    found = page.partition(script.BEGIN)[2].partition(script.END)[0]
    assert found == script.text(), "scripts/rule_table.py writes it anew"


def test_the_table_says_what_is_decided(script: Any) -> None:
    """Every decision lies in exactly one row of the table: what collapses the rows may lose none."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in script.table().splitlines()[2:]]
    by_call: dict[str, list[list[str]]] = {}
    for line in lines:
        for call in line[0].split("; "):
            by_call.setdefault(call.partition("`, ")[0].strip("`"), []).append([call, *line[1:]])
    sets = {"QuickGELU": lambda m: m.endswith("-quickgelu"), "erf GELU": lambda m: not m.endswith("-quickgelu")}
    counted = 0
    for call, model, precision, mode, backends in script.decisions():
        op, _, tower = call.partition(", ")
        rows = []
        for said, models, precisions, modes, *cells in by_call[op]:
            towers = said.partition("`, ")[2].split(" and ")
            if op == "attention" and tower not in towers:
                continue
            named = models.split(", ")
            fits = models == "all" or sets.get(models, lambda m: m.removesuffix("-quickgelu") in named)(model)  # noqa: B023
            if fits and (precisions == "all" or precision in precisions.split(", ")) and modes in ("all", mode):
                rows.append(tuple(cells))
        assert rows == [backends], (call, model, precision, mode, rows)
        counted += 1
    assert counted > 1000


@pytest.mark.parametrize("capability", [None, (7, 5), (8, 7), (10, 3), (11, 0), (12, 1), (13, 0)])
def test_a_card_that_nothing_is_known_of_gets_pytorch(capability: tuple[int, int] | None, script: Any) -> None:
    for precision in script.PRECISIONS:
        for training in (False, True):
            for key in script.keys_of(get_config("ViT-B-32-quickgelu"), precision, training).values():
                assert rules.decide(key, Machine("cuda", capability)).backend != "triton"
                assert rules.decide(key, Machine("xpu")).backend != "triton"


def test_small_calls_and_compiled_ones_get_pytorch_where_launches_outweigh_bytes() -> None:
    hopper = Machine("cuda", (9, 0))
    rows = Key("add_layer_norm", ("bfloat16",) * 3, training=True, large=True, width=1024)
    assert rules.decide(rows, hopper).backend == "triton"
    assert rules.decide(rows._replace(large=False), hopper).backend == "reference"
    assert rules.decide(rows._replace(compiled=True), hopper).backend == "reference"
    heads = Key("attention", ("bfloat16",), training=True, large=True, width=64, tokens=257)
    assert rules.decide(heads, hopper).backend == "triton"
    for change in ({"large": False}, {"training": False}, {"tokens": 577}, {"tokens": 0}, {"causal": True}):
        assert rules.decide(heads._replace(**change), hopper).backend == "torch", change
    assert rules.decide(heads._replace(width=80), hopper).backend == "torch"
    # packed captions: launches are what the kernel saves
    packed = heads._replace(tokens=None, large=False, training=False)
    assert rules.decide(packed, hopper).backend == "triton"
    assert rules.decide(packed._replace(dtypes=("float32",)), hopper).backend == "triton"
    assert rules.decide(packed._replace(dtypes=("float32",), width=128), hopper).backend == "torch"
    assert "FlashAttention" in rules.decide(packed, Machine("cuda", (10, 3))).says
    assert "FlashAttention" not in rules.decide(packed, Machine("cuda", (7, 5))).says


def test_encoders_where_there_is_amx() -> None:
    for dtype, amx, native, backend in (
        ("bfloat16", True, True, "native"),
        # an op library without AMX
        ("bfloat16", True, False, "torch"),
        ("bfloat16", False, False, "native"),
        ("float32", True, False, "native"),
    ):
        machine = Machine("cpu", amx=amx, native_amx=native)
        assert rules.decide(Key("encoder", (dtype,)), machine).backend == backend
        assert rules.decide(Key("encoder", (dtype,)), Machine("cpu", arm=True)).backend == "torch"


# ----------------------------------------------------------------------------------------------------------------------
# the arithmetic


class _Bytes(TorchDispatchMode):
    """Counts the bytes that operators read and write; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = op(*args, **(kwargs or {}))
        results = out if isinstance(out, (tuple, list)) else (out,)
        storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        new = [x for x in results if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in storages]
        if new:
            self.total += sum(x.nbytes for x in (*args, *new) if isinstance(x, Tensor) and x.numel() > 999)
        return out


def _moved(function: Callable[..., Any], *inputs: Tensor, training: bool) -> float:
    """Return the bytes that a function's operators move, with gradients of all inputs of its rows, an element."""
    inputs = tuple(x.detach().requires_grad_(training) for x in inputs)
    with _Bytes() as count:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if training:
            torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs])
    # the gradients that stand for those of what comes behind
    return (count.total - (sum(y.nbytes for y in outputs) * 2 if training else 0)) / inputs[0].numel()


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("form", ["none", "tanh", "quick"])
def test_the_bytes_of_gelu_are_those_that_pytorch_moves(form: str, training: bool) -> None:
    x = torch.randn(64, 64).bfloat16()
    found = _moved(lambda x: registry.entries["bias_gelu"].implementations[-1].run(x, None, form), x, training=training)
    key = Key("bias_gelu", ("bfloat16",), training=training, form=form)
    assert found == rules.bytes_moved(key)[0]
    # the sum that is the bias' gradient reads them once more
    with_bias = rules.bytes_moved(key._replace(bias=True))[0]
    assert with_bias == found + 2 * training


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtypes", [("bfloat16",) * 3, ("bfloat16", "float32", "float32"), ("float32",) * 3], ids=str)
def test_the_bytes_of_norms_are_those_that_pytorch_moves(dtypes: tuple[str, ...], training: bool) -> None:
    x, residual = (torch.randn(64, 64).to(getattr(torch, d)) for d in dtypes[:2])
    weight = torch.ones(64, dtype=getattr(torch, dtypes[2]))
    reference = registry.entries["add_layer_norm"].implementations[-1].run
    found = _moved(lambda *rows: reference(*rows, weight, weight, 1e-5), x, residual, training=training)
    key = Key("add_layer_norm", dtypes, training=training)
    stream = 4 if "float32" in dtypes else 2
    # on a card, sums over rows are a pass of their own, which reads two tensors
    assert found + 2 * stream * training == rules.bytes_moved(key)[0]


def test_a_large_call_keeps_a_card_busy() -> None:
    """The threshold is what its comment says: the elements at which a block's card time is its host time."""
    host = (143 + 166 + 112 + 122 + 300) * 1e-6
    for width in (512, 768, 1024, 1280):
        token = 72 * width**2 / 798e12 + 88 * width / 3.0e12
        assert 0.5 < host / token * width / LARGE < 1.5, width


# ----------------------------------------------------------------------------------------------------------------------
# keys


@contextmanager
def _autocast_on_cards() -> Iterator[None]:
    # torch.autocast asks for a GPU
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


def _call_of(op: str, batch: int, device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, ...]:
    def empty(*shape: int) -> Tensor:
        # nothing else can be done with a fake tensor of a card that this PyTorch knows nothing of
        return torch.empty(*shape, device=device, dtype=dtype)

    if op == "layer_norm":
        return empty(batch, 50, 768), empty(768), empty(768)
    if op == "add_layer_norm":
        return empty(batch, 50, 768), empty(batch, 50, 768), empty(768), empty(768)
    if op == "bias_gelu":
        return empty(batch, 50, 3072), empty(3072), "none"
    if op == "attention":
        return empty(batch, 50, 3, 12, 64), 12
    if op == "single_query_attention":
        return empty(batch, 768), empty(batch, 50, 768), empty(batch, 50, 768), 12
    if op in ("contrastive_loss", "siglip_loss"):
        return empty(batch, 512), empty(batch, 512), 1.0, None, Options(None, "gather", "mean", False, False)
    assert op == "encoder"
    shapes = ((64,), (64,), (192, 64), (192,), (64, 64), (64,), (64,), (64,), (256, 64), (256,), (64, 256), (64,))
    weights = [torch.empty(shape) for shape in shapes]
    block = BlockWeights(*(tuple(weights[i : i + 2]) for i in range(0, 12, 2)))
    return torch.empty(2 * batch, 64), PackedEncoder([block], 2, False, "none", 1e-5), torch.arange(0, 2 * batch + 1, 2)


BATCHES = (1, 2, 31, 256, 4096)


def _names(op: str, device: str) -> set[str]:
    # values of offsets are read
    if op == "encoder":
        return {dispatch.shape_class(op, *_call_of(op, batch, device)) for batch in BATCHES}
    with FakeTensorMode(allow_non_fake_inputs=True):
        return {dispatch.shape_class(op, *_call_of(op, batch, device)) for batch in BATCHES}


def _with_keys_of_their_own() -> list[str]:
    # the others' key is the first tensor's dtype, and the modes
    return [op for op, entry in registry.entries.items() if getattr(entry.key, "func", None) is not registry._key]


@pytest.mark.parametrize("op", ["packed", "single_query_attention", *_with_keys_of_their_own()])
def test_no_key_depends_on_the_batch_where_results_may_not(op: str) -> None:
    def names() -> set[str]:
        if op != "packed":
            return _names(op, "cuda")
        with FakeTensorMode(allow_non_fake_inputs=True):
            return {
                dispatch.shape_class("attention", torch.empty(20 * s, 3, 8, 64, device="cuda"), 8, cu_seqlens=offsets)
                for s in BATCHES
                for offsets in [torch.empty(s + 1, dtype=torch.int32, device="cuda")]
            }

    with clipfast.deterministic():
        assert len(names()) == 1
    # elsewhere there are large calls and small ones of what has kernels; ranks agree on the losses
    assert len(names()) == (2 if op in (*KERNELS, "packed") else 1)
    if op != "packed":
        # a LayerNorm with gradients: a small one's time is its bookkeeping
        assert len(_names(op, "cpu")) == (2 if op in ("layer_norm", "add_layer_norm") else 1)
        with clipfast.deterministic():
            assert len(_names(op, "cpu")) == 1
        with torch.no_grad():
            assert len(_names(op, "cpu")) == 1


def test_a_key_tells_training_and_autocast() -> None:
    x, weight = torch.zeros(2, 768), torch.ones(768)
    assert dispatch.shape_class("layer_norm", x, weight, weight) == "float32, width ≤ 1024, small, training"
    with torch.no_grad():
        assert dispatch.shape_class("layer_norm", x, weight, weight) == "float32, width ≤ 1024, inference"
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.shape_class("bias_gelu", x.bfloat16(), weight, "quick") == (
            "quick, bfloat16/float32, bias, width ≤ 1024, training, autocast"
        )
    assert dispatch.shape_class("attention", x[:, None, :], 4, causal=True) == (
        "float32, head_dim 64, causal, ≤ 64 tokens, training"
    )
    wide = torch.zeros(1, 9000)
    assert "width > 8192" in dispatch.shape_class("layer_norm", wide, wide[0], wide[0])


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_the_table_is_about_the_calls_that_a_model_makes(precision: str, script: Any) -> None:
    """The keys in the script are those that calls of a block's sizes have."""
    product = torch.bfloat16 if precision == "autocast" else getattr(torch, precision)
    stream = torch.float32 if precision == "autocast" else product
    with FakeTensorMode(allow_non_fake_inputs=True):

        def empty(*shape: int, dtype: torch.dtype = product) -> Tensor:
            return torch.empty(*shape, device="cuda", dtype=dtype)

        tokens, norm = empty(4096, 50, 768, dtype=stream), empty(768, dtype=stream)
        features = empty(4096, 512, dtype=stream)
        calls = {
            "layer_norm, images": ("layer_norm", tokens, norm, norm),
            "add_layer_norm, images": ("add_layer_norm", empty(4096, 50, 768), tokens, norm, norm),
            "bias_gelu, images": ("bias_gelu", empty(4096, 50, 3072), empty(3072, dtype=stream), "none"),
            "attention, images": ("attention", empty(4096, 50, 3, 12, 64), 12),
            "contrastive_loss": ("contrastive_loss", features, features, 1.0),
        }
        for training in (False, True):
            expected = script.keys_of(get_config("ViT-B-32"), precision, training)
            with torch.set_grad_enabled(training):
                for what, call in calls.items():
                    if precision == "autocast":
                        with _autocast_on_cards():
                            key = dispatch.key_of(*call)
                    else:
                        key = dispatch.key_of(*call)
                    assert key == expected[what], what


def test_a_compiler_gets_one_key_for_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced may not ask for the number of rows: it would be compiled again for another batch."""
    monkeypatch.setattr(keys, "_SIZED", {"cpu"})
    monkeypatch.setattr(keys, "LARGE", 64)
    x, weight = torch.randn(3, 16), torch.ones(16)
    assert [dispatch.key_of("layer_norm", x.repeat(n, 1), weight, weight).large for n in (1, 2)] == [False, True]
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: clipfast.ops.layer_norm(x, weight, weight) + F.relu(x), backend=counter)
    for rows in (2, 3, 5, 70):
        x = torch.randn(rows, 16)
        torch._dynamo.mark_dynamic(x, 0)
        compiled(x)
    assert counter.frame_count == 1
