"""The choice of an implementation: forced, explained, and announced where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import interpreter
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import clipfast
from clipfast import ops
from clipfast.ops import announcements, dispatch, fallback, keys, measured, plan, registry, rules, trust
from clipfast.ops.bias_gelu import kernel_adds_bias
from clipfast.ops.call_classes import Key
from clipfast.ops.encoder import BlockWeights, PackedEncoder, encode
from clipfast.ops.rules import Rule

QKV = torch.zeros(1, 4, 48)


@pytest.fixture(autouse=True)
def _nothing_announced_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "_announced", set())


def test_explain_names_the_implementation_and_its_rivals() -> None:
    text = clipfast.explain("attention", QKV, 2)
    assert text.splitlines()[0] == "attention: torch (scaled_dot_product_attention)"
    assert "not reference" in text
    with clipfast.backend("reference"):
        text = clipfast.explain("attention", QKV, 2)
    assert text.startswith("attention: reference")
    assert "the reference backend was asked for" in text


def test_explain_gives_the_reason() -> None:
    offsets = torch.tensor([0, 4], dtype=torch.int32)
    text = clipfast.explain("attention", QKV[0], 2, cu_seqlens=offsets)
    assert text.startswith("attention: torch")
    assert "not triton (packed queries, keys and values in place): head_dim 8 is not served" in text
    assert "not reference (explicit softmax in plain PyTorch): the rule takes torch" in text


def test_explain_checks_the_call() -> None:
    with pytest.raises(ValueError, match=r"got 'conv', expected one of .*'attention'"):
        clipfast.explain("conv")
    with pytest.raises(ValueError, match="expected"):
        clipfast.explain("attention", QKV, 7)


def test_a_backend_that_is_not_there_is_announced_once() -> None:
    expected = ops.attention(QKV, 2)
    with clipfast.backend("native"):
        with pytest.warns(ops.FallbackWarning, match="attention does not use the native backend.*no native"):
            assert torch.equal(ops.attention(QKV, 2), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.attention(QKV, 2)


def test_a_refused_call_is_announced_with_its_reason() -> None:
    with clipfast.backend("triton"), pytest.warns(ops.FallbackWarning, match="head_dim 8 is not served"):
        ops.attention(QKV, 2)


def test_the_backend_is_restored() -> None:
    with pytest.raises(RuntimeError, match="inside"), clipfast.backend("reference"):
        raise RuntimeError("inside")
    assert clipfast.explain("attention", QKV, 2).startswith("attention: torch")
    with pytest.raises(ValueError, match="got 'cuda', expected one of 'auto'"), clipfast.backend("cuda"):
        pass


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_the_environment_variable() -> None:
    code = "import clipfast, torch; print(clipfast.explain('attention', torch.zeros(1, 4, 48), 2))"
    assert run_python(code, CLIPFAST_BACKEND="reference").stdout.startswith("attention: reference")
    wrong = run_python(code, CLIPFAST_BACKEND="fast")
    assert "CLIPFAST_BACKEND: got 'fast', expected one of 'auto'" in wrong.stderr


@pytest.mark.parametrize(
    "statement",
    ["from clipfast.ops import attention", "import clipfast.ops.attention; attention = clipfast.ops.attention"],
)
def test_ops_are_functions_however_they_are_imported(statement: str) -> None:
    code = f"{statement}\nimport clipfast, clipfast.ops.attention\nassert callable(attention), attention"
    code += "\nassert callable(clipfast.ops.attention) and callable(clipfast.ops.layer_norm)"
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# choices are kept, and forgotten


@dataclass
class Spy:
    """An op whose calls are counted: how often its arguments were checked, and what served it."""

    checks: int = 0
    refused: str | None = None
    served: list[str] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        return dispatch.call("double", x)

    def checks_of(self, x: Tensor, times: int = 3) -> int:
        """Return how many of some calls in a row are checked."""
        before = self.checks
        for _ in range(times):
            assert torch.equal(self(x), x + x)
        return self.checks - before


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Spy]:
    counted = Spy()

    def prepare(x: Tensor) -> tuple[Tensor]:
        counted.checks += 1
        if x.dim() == 0:
            raise ValueError("double(x): got a scalar")
        return (x,)

    def run(backend: str) -> Callable[[Tensor], Tensor]:
        def double(x: Tensor) -> Tensor:
            counted.served.append(backend)
            return 2 * x

        return double

    # an op for this test alone
    monkeypatch.setitem(registry.entries, "double", None)
    named = Rule(("double",), lambda key, machine: key.training, "triton", "it learns", "2 is more than 1")
    other = Rule(("double",), lambda key, machine: True, "reference", "it does not", "1 is less than 2")
    monkeypatch.setattr(rules, "RULES", (named, other))
    dispatch.register(
        "double",
        prepare,
        dispatch.Implementation("triton", "kernel", run("triton"), lambda x: counted.refused),
        dispatch.Implementation("reference", "sum", run("reference")),
        key=lambda x: Key("double", (str(x.dtype),), **keys.modes(x), width=x.shape[-1]),
        signature=lambda x: (x.shape, x.dtype, x.device, keys.moment(x)),
    )
    plan.reset()
    yield counted
    plan.reset()


X = torch.ones(4)


def test_a_choice_is_made_once_for_calls_that_are_alike(spy: Spy) -> None:
    assert spy.checks_of(X) == 1
    assert spy.checks_of(torch.zeros(4)) == 0
    assert spy.checks_of(torch.zeros(5)) == 1
    assert spy.checks_of(X.double()) == 1
    assert set(spy.served) == {"triton"}


def test_wrong_arguments_are_an_error_every_time(spy: Spy) -> None:
    assert spy.checks_of(X) == 1
    for _ in range(3):
        with pytest.raises(ValueError, match="got a scalar"):
            spy(torch.tensor(1.0))
    for wrong in (None, [1.0], "x"):
        with pytest.raises(AttributeError, match="dim"):
            spy(wrong)


def test_what_is_wrong_in_an_implementation_is_not_taken_for_a_miss(spy: Spy) -> None:
    spy(X)
    kept, calls = registry.entries["double"].current[1], []

    def fail(x: Tensor) -> Tensor:
        calls.append(x)
        raise KeyError("inside")

    assert len(kept) == 1
    kept.update(dict.fromkeys(kept, fail))
    with pytest.raises(KeyError, match="inside"):
        spy(X)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda: clipfast.backend("reference"),
        clipfast.deterministic,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: _environment(TRITON_INTERPRET="2"),
    ],
    ids=["backend", "deterministic", "gradients", "autocast", "environment"],
)
def test_another_setting_is_another_choice(spy: Spy, change: Callable[[], Any]) -> None:
    assert spy.checks_of(X) == 1
    with change():
        assert spy.checks_of(X) == 1
    # and the first is still known
    assert spy.checks_of(X) == 0


def test_settings_decide(spy: Spy) -> None:
    for _ in range(2):
        spy(X)
        with torch.no_grad():
            spy(X)
        with clipfast.backend("reference"):
            spy(X)
    assert spy.served == ["triton", "reference", "reference"] * 2


@pytest.mark.parametrize(
    "event",
    [
        plan.reset,
        lambda: plan.adopt(plan.export()),
        lambda: fallback.remember("double", X.device, "no C compiler"),
        lambda: fallback.remember("double", X.device, "not ready", captured_only=True),
        lambda: fallback.forget("double"),
        fallback.forget_captures,
        trust.forget,
        lambda: trust._decide("double", X.device, trust.Trial("of this test", object(), lambda n: 1 / 0)),
    ],
    ids=["reset", "adopt", "failure", "failure in a capture", "forgiven", "warm", "unchecked", "a failed check"],
)
def test_an_event_ends_every_choice(spy: Spy, event: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ops.FallbackWarning)
        assert spy.checks_of(X) == 1
        with clipfast.backend("reference"):
            assert spy.checks_of(X) == 1
        spy.refused = "it failed"
        assert spy.checks_of(X) == 0
        event()
        assert spy.checks_of(X) == 1
        assert spy.served[-1] == "reference"
        with clipfast.backend("reference"):
            assert spy.checks_of(X) == 1
    fallback.forget()


def test_nothing_is_kept_of_what_is_recorded_or_of_the_moment(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        spy(X)
        spy(X)
    assert spy.checks == 2
    torch.jit.trace(lambda x: spy(x), (X,), check_trace=False)
    assert spy.served[-1] == "reference"
    spy.served.clear()
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "momentary", [lambda device: device == X.device])
        assert spy.checks_of(X) == 3
    assert spy.checks_of(X) == 1
    assert spy.checks_of(X) == 0
    # a trace does not take what was kept either
    torch.jit.trace(lambda x: spy(x), (X,), check_trace=False)
    assert spy.served[-1] == "reference"


def test_a_backend_that_is_not_to_be_had_is_looked_for_again(spy: Spy) -> None:
    spy.refused = "no card"
    with clipfast.backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ops.FallbackWarning)
        assert spy.checks_of(X) == 3
        spy.refused = None
        spy(X)
    assert spy.served[-1] == "triton"


@pytest.mark.parametrize("change", [clipfast.deterministic, dispatch.forget_choices], ids=["a switch", "an event"])
def test_a_choice_is_not_kept_if_something_changed_while_it_was_made(spy: Spy, change: Callable[[], Any]) -> None:
    entry = registry.entries["double"]
    check = entry.prepare

    def meanwhile(x: Tensor) -> tuple[Tensor]:
        # as another thread would
        with change() or nullcontext():
            return check(x)

    entry.prepare = meanwhile
    assert spy.checks_of(X) == 3
    entry.prepare = check
    assert spy.checks_of(X) == 1
    assert spy.checks_of(X) == 0


def test_kept_choices_do_not_fill_the_memory(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_MOST", 8)
    for n in range(1, 30):
        spy(torch.ones(n))
    assert 0 < len(registry.entries["double"].current[1]) <= 8


def test_the_measurements_name_ops_and_backends_that_exist() -> None:
    for measurements in measured.CARDS.values():
        for op, fastest in measurements.fastest.items():
            assert set(fastest.values()) <= set(dispatch.plannable(op))


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


# ----------------------------------------------------------------------------------------------------------------------
# the ops: a second call of a kind gives what a first one does


def _offsets(*ends: int) -> Tensor:
    return torch.tensor([0, *ends], dtype=torch.int32)


def _encoder(dtype: torch.dtype = torch.float32) -> PackedEncoder:
    generator = torch.Generator().manual_seed(0)
    shapes = ((64,), (64,), (192, 64), (192,), (64, 64), (64,), (64,), (64,), (256, 64), (256,), (64, 256), (64,))
    weights = [0.1 * torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]
    block = BlockWeights(*(tuple(weights[i : i + 2]) for i in range(0, 12, 2)))
    return PackedEncoder([block], 2, True, "none", 1e-5)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


_ROWS, _ONE = _random(3, 7, 64), _random(64, seed=1)
_QKV, _PACKED, _ENCODER = _random(2, 5, 192), _random(9, 192), _encoder()
_KEYS = _random(2, 5, 64)
CALLS: dict[str, Callable[[], Any]] = {
    "layer_norm": lambda: ops.layer_norm(_ROWS, _ONE, _ONE),
    "layer_norm, eps": lambda: ops.layer_norm(_ROWS, _ONE, _ONE, 0.1),
    "add_layer_norm": lambda: ops.add_layer_norm(_ROWS, _ROWS.flip(0), _ONE, _ONE)[0],
    "add_layer_norm, eps": lambda: ops.add_layer_norm(_ROWS, _ROWS.flip(0), _ONE, _ONE, 0.1)[0],
    **{f"bias_gelu, {f}": lambda f=f: ops.bias_gelu(_ROWS, _ONE, f) for f in ("none", "tanh", "quick")},
    "bias_gelu, no bias": lambda: ops.bias_gelu(_ROWS),
    "attention": lambda: ops.attention(_QKV, 2),
    "attention, whole": lambda: ops.attention(_QKV.view(2, 5, 3, 2, 32), 2),
    "attention, heads": lambda: ops.attention(_QKV, 4),
    "attention, causal": lambda: ops.attention(_QKV, 2, causal=True),
    "attention, scale": lambda: ops.attention(_QKV, 2, scale=0.5),
    "attention, another scale": lambda: ops.attention(_QKV, 2, scale=0.25),
    "attention, a tensor": lambda: ops.attention(_QKV, 2, scale=torch.tensor(0.3)),
    "attention, packed": lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets(4, 9)),
    "attention, other offsets": lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets(2, 9)),
    "attention, packed whole": lambda: ops.attention(_PACKED.view(9, 3, 2, 32), 2, cu_seqlens=_offsets(2, 9)),
    "attention, fewer tokens": lambda: ops.attention(_PACKED[:5], 2, causal=True, cu_seqlens=_offsets(5).long()),
    "single_query_attention": lambda: ops.single_query_attention(_KEYS[:, 0], _KEYS, _KEYS, 2),
    "single_query_attention, heads": lambda: ops.single_query_attention(_KEYS[:, 0], _KEYS, _KEYS, 4, scale=0.5),
    "single_query_attention, lengths": lambda: ops.single_query_attention(
        _KEYS[:, 0], _KEYS, _KEYS, 2, lengths=torch.tensor([2, 5])
    ),
    "encoder": lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(3, 7).long()),
    "encoder, read": lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(3, 7).long(), read=-1),
}


def test_a_call_that_is_looked_up_gives_what_one_that_is_chosen_does() -> None:
    with torch.no_grad():
        dispatch.forget_choices()
        # every call is the first of its kind that this one asks for, and then a later one
        first = {}
        for what, call in CALLS.items():
            dispatch.forget_choices()
            first[what] = call()
        for _ in range(2):
            for what, call in CALLS.items():
                assert torch.equal(call(), first[what]), what
        assert sum(len(entry.current[1]) for entry in registry.entries.values()) >= len(CALLS) - 4


_BAD = torch.zeros(63)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "weight": (lambda: ops.layer_norm(_ROWS, _BAD, _ONE), r"layer_norm\(weight\): got shape \(63,\)"),
    "bias": (lambda: ops.layer_norm(_ROWS, _ONE, _BAD), r"layer_norm\(bias\): got shape \(63,\)"),
    "matrix": (lambda: ops.layer_norm(_ROWS, _ONE.view(1, 64), _ONE), r"weight\): got shape \(1, 64\)"),
    "integers": (lambda: ops.layer_norm(_ROWS.long(), _ONE, _ONE), "got torch.int64, expected a floating-point"),
    "residual": (lambda: ops.add_layer_norm(_ROWS, _ROWS[:2], _ONE, _ONE), r"residual\): got shape \(2, 7, 64\)"),
    "added weight": (lambda: ops.add_layer_norm(_ROWS, _ROWS, _BAD, _ONE), r"weight\): got shape \(63,\)"),
    "GELU's bias": (lambda: ops.bias_gelu(_ROWS, _BAD), r"bias_gelu\(bias\): got shape \(63,\)"),
    "a form": (lambda: ops.bias_gelu(_ROWS, _ONE, "erf"), "got 'erf', expected one of"),
    "GELU's dtype": (lambda: ops.bias_gelu(_ROWS.int()), "got torch.int32"),
    "heads": (lambda: ops.attention(_QKV, 5), r"attention\(qkv\): got shape \(2, 5, 192\)"),
    "no heads": (lambda: ops.attention(_QKV, 0), r"num_heads = 0"),
    "no tokens": (lambda: ops.attention(_QKV[:, :0], 2), "got 0 tokens"),
    "packed": (lambda: ops.attention(_QKV, 2, cu_seqlens=_offsets(2)), r"expected \[total, 3·H·D\]"),
    "an end": (lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets(4, 8)), r"got 0 … 8, expected offsets"),
    "a descent": (lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets(10, 9)), "expected offsets"),
    "offsets": (lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets(9).float()), "got torch.float32, expected int32"),
    "shape of offsets": (lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets(9)[None]), r"expected \[S \+ 1\]"),
    "no offsets": (lambda: ops.attention(_PACKED, 2, cu_seqlens=_offsets()[:0]), r"expected \[S \+ 1\]"),
    "a query": (lambda: ops.single_query_attention(_KEYS[:, 0], _KEYS, _KEYS, 5), "with H = num_heads = 5"),
    "keys": (lambda: ops.single_query_attention(_KEYS[:, 0], _KEYS[:1], _KEYS, 2), "key"),
    "lengths": (
        lambda: ops.single_query_attention(_KEYS[:, 0], _KEYS, _KEYS, 2, lengths=torch.tensor([1])),
        r"lengths\): got shape \(1,\)",
    ),
    "an encoder's x": (lambda: encode(_ROWS[0, :, :32], _ENCODER, cu_seqlens=_offsets(7).long()), r"encode\(x\): got"),
    "an encoder's dtype": (lambda: encode(_ROWS[0].double(), _ENCODER, cu_seqlens=_offsets(7).long()), "float64"),
    "an encoder's offsets": (lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(6).long()), "got 0 … 6"),
    "an empty sequence": (lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(3, 3, 7).long()), "no sequence empty"),
    "32 bits": (lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(7)), "got torch.int32"),
    "a position": (
        lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(7).long(), read=7),
        "got 7, expected -1 to 6",
    ),
    "not the last": (lambda: encode(_ROWS[0], _ENCODER, cu_seqlens=_offsets(7).long(), read=2), "expected -1 or None"),
}


@pytest.mark.parametrize("what", WRONG)
def test_no_error_is_lost_behind_right_calls(what: str) -> None:
    call, message = WRONG[what]
    with torch.no_grad():
        for right in CALLS.values():
            right()
        for _ in range(2):
            with pytest.raises((TypeError, ValueError), match=message):
                call()


def test_offsets_are_checked_every_time_for_kernels_too() -> None:
    # PyTorch's implementation checks them again, kernels read past the end
    with torch.no_grad(), clipfast.backend("triton"):
        for _ in range(2):
            ops.attention(_PACKED, 2, cu_seqlens=_offsets(4, 9))
            with pytest.raises(ValueError, match="expected offsets"):
                ops.attention(_PACKED, 2, cu_seqlens=_offsets(4, 10))


class _Layers(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one = x.new_ones(64)
        hidden = ops.bias_gelu(x, one) if kernel_adds_bias(x, one) else ops.bias_gelu(x + one)
        hidden = ops.add_layer_norm(hidden, ops.layer_norm(x, one, one), one, one)[0]
        read = ops.single_query_attention(hidden[:, 0], hidden, hidden, 2)
        return read + ops.attention(hidden.repeat(1, 1, 3), 2)[:, 0]


@pytest.mark.parametrize("how", ["export", "strict export", "make_fx"])
def test_what_is_traced_for_any_batch_stays_so(how: str) -> None:
    """A signature asks for sizes, which would make constants of symbols."""
    model, x = _Layers(), _random(3, 7, 64)
    model(x)
    if how == "make_fx":
        traced = make_fx(model, tracing_mode="symbolic")(x)
    else:
        shapes = ({0: torch.export.Dim("batch")},)
        traced = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=how == "strict export").module()
    for batch in (2, 5):
        x = _random(batch, 7, 64)
        torch.testing.assert_close(traced(x), model(x))


def test_kernel_adds_bias_follows_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(3, 16)
    # the op library's kernel, where there is one
    native = dispatch.chosen("bias_gelu", torch.zeros(3, 64), _ONE) == "native"
    for _ in range(2):
        assert kernel_adds_bias(x, _ONE) == native
        with clipfast.backend("reference"):
            assert not kernel_adds_bias(x, _ONE)
        with clipfast.backend("triton"):
            assert kernel_adds_bias(x, _ONE)
            with monkeypatch.context() as patch:
                interpreter.leave_out(patch)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", ops.FallbackWarning)
                    assert kernel_adds_bias(x, _ONE) == native


def test_a_forced_backend_without_its_hardware_says_so() -> None:
    code = """
import clipfast, torch
with clipfast.backend("triton"):
    print(clipfast.explain("layer_norm", torch.zeros(2, 8), torch.ones(8), torch.ones(8)))
"""
    done = run_python(code, TRITON_INTERPRET="0")
    assert done.stdout.startswith("layer_norm: reference"), done.stderr
    assert "on the CPU only with TRITON_INTERPRET=1" in done.stdout or "Triton is not installed" in done.stdout


def test_triton_is_not_imported_before_a_kernel_runs() -> None:
    code = """
import sys
import clipfast, torch
from clipfast import ops
x = torch.zeros(2, 8)
ops.layer_norm(x, x[0], x[0]), ops.bias_gelu(x), clipfast.explain("bias_gelu", x)
print("triton" in sys.modules)
"""
    assert run_python(code).stdout.strip() == "False"
