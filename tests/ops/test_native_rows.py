"""LayerNorm and GELU on the CPU by the op library, with AVX-512 and with AVX2: right, repeatable, or refused."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle import assert_as_exact_as_reference
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import clipfast
from clipfast import ops
from clipfast.ops import dispatch, native_rows
from clipfast.ops.bias_gelu import kernel_adds_bias

_X = torch.zeros(2, 8)
pytestmark = pytest.mark.skipif(
    native_rows.refusal(_X) is not None, reason=f"the op library cannot serve rows here: {native_rows.refusal(_X)}"
)

FORMS = ("none", "tanh", "quick")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# whole vectors of 16 and 8 lanes, parts of them, fewer than one
WIDTHS = (768, 101, 24, 7, 1)


@pytest.fixture(autouse=True)
def native() -> Iterator[None]:
    with clipfast.backend("native"):
        yield


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def results(function: Callable[..., object], inputs: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    d_outputs = tuple(d.to(y.dtype) for d, y in zip(d_outputs, outputs, strict=True))
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, d_outputs))


def check(
    function: Callable[..., object], inputs: tuple[Tensor, ...], d_outputs: tuple[Tensor, ...], what: str
) -> None:
    found = results(function, inputs, d_outputs)
    with clipfast.backend("reference"):
        reference = results(function, inputs, d_outputs)
        exact = results(function, tuple(t.double() for t in inputs), tuple(d.double() for d in d_outputs))
    for i, tensors in enumerate(zip(found, reference, exact, strict=True)):
        # gradients of LayerNorm over one column are zero
        scale = float(tensors[2].abs().max()) or 1.0
        assert_as_exact_as_reference(*tensors, f"{what}, result {i}", scale)


def add(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, bias_of_x: Tensor) -> tuple[Tensor, Tensor]:
    return ops.add_layer_norm(x, residual, weight, bias, 1e-5, bias_of_x)


def check_everything(width: int, dtype: torch.dtype, rows: int = 37) -> None:
    """Check all ops, forward and backward, by the contract of every fast path."""
    x, residual, dy, d_stream = (random(i, rows, width, dtype=dtype, scale=2) for i in range(4))
    weight, bias = random(4, width, dtype=dtype), random(5, width, dtype=dtype)
    for form in FORMS:
        about = f"{form}, {width}, {dtype}"
        check(lambda x, b, form=form: ops.bias_gelu(x, b, form), (x, bias), (dy,), about)
        check(lambda x, form=form: ops.bias_gelu(x, None, form), (x,), (dy,), f"{about}, no bias")
    check(ops.layer_norm, (x, weight, bias), (dy,), f"layer_norm, {width}, {dtype}")
    check(add, (x, residual, weight, bias, bias), (dy, d_stream), f"add_layer_norm, {width}, {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_as_exact_as_the_reference(width: int, dtype: torch.dtype) -> None:
    assert native_rows.refusal(random(0, 2, width, dtype=dtype)) is None
    check_everything(width, dtype)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    return subprocess.run(
        [sys.executable, "-c", code, str(here.parent / "support"), str(here)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_many_rows() -> None:
    """More rows than the sums over rows have blocks for, and a last block that is not full."""
    check_everything(24, torch.float32, rows=32 * 256 + 77)


def test_avx2_is_as_exact() -> None:
    """What a CPU without AVX-512 runs: which it is, is asked for once a process."""
    code = """
import sys
sys.path[:0] = sys.argv[1:]
import clipfast, test_native_rows as t
assert t.native_rows.refusal(t._X) is None
assert t.torch.ops.clipfast.row_vectors() == "avx2"
with clipfast.backend("native"):
    for dtype in t.DTYPES:
        for width in (104, 101, 7):
            t.check_everything(width, dtype)
"""
    done = run_python(code, ATEN_CPU_CAPABILITY="avx2")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("of_weight", DTYPES, ids=str)
@pytest.mark.parametrize("dtypes", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype], of_weight: torch.dtype) -> None:
    x, residual = (random(i, 21, 72, dtype=d) for i, d in enumerate(dtypes))
    weight, bias = random(4, 72, dtype=of_weight), random(5, 72, dtype=of_weight)
    bias_of_x = random(6, 72, dtype=dtypes[0])
    d_outputs = random(7, 21, 72), random(8, 21, 72)
    check(add, (x, residual, weight, bias, bias_of_x), d_outputs, "add_layer_norm")
    check(ops.layer_norm, (x, weight, bias), d_outputs[:1], "layer_norm")
    check(lambda x, b: ops.bias_gelu(x, b, "quick"), (x, bias), d_outputs[:1], "bias_gelu")


# ----------------------------------------------------------------------------------------------------------------------
# values


@pytest.mark.parametrize("form", FORMS)
def test_the_ends_of_gelu(form: str) -> None:
    """Far out the functions are x and 0, their derivatives 1 and 0; nothing overflows, and NaN stays NaN."""
    # σ(1.702 · 15) is not yet 1
    large = torch.tensor([60.0 if form == "quick" else 15.0, 1e3, 1e5, 1e20, 3e38])
    x = torch.cat([large, -large]).requires_grad_()
    y = ops.bias_gelu(x, None, form)
    y.backward(torch.ones(10))
    assert torch.equal(y, torch.cat([large, torch.zeros(5)]))
    assert torch.equal(x.grad, torch.tensor([1.0] * 5 + [0.0] * 5))
    special = torch.tensor([float("nan"), float("inf")]).requires_grad_()
    y = ops.bias_gelu(special, None, form)
    assert y[0].isnan()
    assert y[1] == float("inf")
    assert torch.autograd.grad(y[0], special)[0][0].isnan()


@pytest.mark.parametrize("form", FORMS)
def test_the_tails_of_gelu_keep_their_digits(form: str) -> None:
    x = torch.linspace(-9, -3, 200).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y = ops.bias_gelu(x, None, form)
    # 1 + erf and 1 + tanh have no digits left there, in float64 neither
    expected = {
        "none": exact / 2 * torch.special.erfc(-exact / 2**0.5),
        "tanh": exact * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)),
        "quick": exact * torch.sigmoid(1.702 * exact),
    }[form]
    # an argument that is rounded before it is an exponent costs as many units as it is large
    assert ((y.double() - expected) / expected).abs().max() < 1e-5
    slope, wanted = torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(expected.sum(), exact)[0]
    assert ((slope.double() - wanted) / wanted).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_digits(dtype: torch.dtype) -> None:
    x = (300 + 8 * random(0, 16, 512)).to(dtype)
    check(
        ops.layer_norm, (x, random(1, 512, dtype=dtype), random(2, 512, dtype=dtype)), (random(3, 16, 512),), "output"
    )


def test_rows_apart_and_expanded_gradients() -> None:
    x, weight = random(0, 9, 4, 64), random(1, 64)
    for view in (x[:, 0], x.transpose(0, 1), x[..., ::2].repeat(1, 1, 2)):
        a, b = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
        for op in (lambda t: ops.layer_norm(t, weight, weight), lambda t: ops.bias_gelu(t, weight, "none")):
            assert torch.equal(torch.autograd.grad(op(a).sum(), a)[0], torch.autograd.grad(op(b).sum(), b)[0])


def test_no_rows() -> None:
    leaves = [random(0, 0, 16), random(1, 16), random(2, 16)]
    for function in (ops.layer_norm, lambda x, w, b: ops.bias_gelu(x, b, "quick") * w):
        y, dx, *sums = results(function, tuple(leaves), (random(3, 0, 16),))
        assert y.shape == dx.shape == (0, 16)
        assert all(torch.equal(s, torch.zeros(16)) for s in sums)


# ----------------------------------------------------------------------------------------------------------------------
# repeatable


def everything(rows: int = 1000, width: int = 96) -> list[Tensor]:
    x, residual, dy, d_stream = (random(i, rows, width) for i in range(4))
    weight, bias = random(4, width), random(5, width)
    found = results(add, (x, residual, weight, bias, bias), (dy, d_stream))
    return found + results(lambda x, b: ops.bias_gelu(x, b), (x, bias), (dy,))


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            found.append(everything())
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_does_not_depend_on_its_company(dtype: torch.dtype) -> None:
    tensors = [random(i, 40, 100, dtype=dtype) for i in range(4)]
    weight = random(4, 100, dtype=dtype)

    def rows(part: slice) -> list[Tensor]:
        x, residual, dy, d_stream = (t[part] for t in tensors)
        y, stream, dx, d_residual, *_ = results(add, (x, residual, *[weight] * 3), (dy, d_stream))
        return [y, stream, dx, d_residual, *results(lambda x, b: ops.bias_gelu(x, b), (x, weight), (dy,))[:2]]

    whole = rows(slice(None))
    for part in (slice(0, 1), slice(7, 8), slice(13, 40)):
        assert all(torch.equal(a[part], b) for a, b in zip(whole, rows(part), strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# what is kept, and how it composes


def kept(function: Callable[[], Tensor]) -> list[Tensor]:
    tensors: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        tensors.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return tensors


def test_saved_tensors() -> None:
    x, residual, weight = (t.requires_grad_() for t in (random(0, 6, 64), random(1, 6, 64), random(2, 64)))
    of_rows = [t for t in kept(lambda: ops.layer_norm(x, weight, weight)) if t.numel() > 64]
    assert [t.data_ptr() for t in of_rows] == [x.data_ptr()]
    tensors = kept(lambda: ops.layer_norm(x, weight, weight))
    assert sum(t.nbytes for t in tensors if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())) == 2 * 4 * 6
    tensors = kept(lambda: sum(t.sum() for t in ops.add_layer_norm(x, residual, weight, weight)))
    assert [t.numel() for t in tensors if t.numel() > 64] == [x.numel()]
    assert {t.data_ptr() for t in kept(lambda: ops.bias_gelu(x, weight))} == {x.data_ptr(), weight.data_ptr()}


def _functions() -> dict[str, Callable[..., Tensor]]:
    return {
        "layer_norm": lambda x, w: ops.layer_norm(x, w, w).sin(),
        "add_layer_norm": lambda x, w: sum(t.sin() for t in ops.add_layer_norm(x, 2 * x, w, w, 1e-5, w)),
        "bias_gelu": lambda x, w: sum(ops.bias_gelu(x, w, form) for form in FORMS),
    }


@pytest.mark.parametrize("name", _functions())
def test_gradients_can_be_derived_again(name: str) -> None:
    inputs = [random(0, 5, 16).requires_grad_(), random(1, 16).requires_grad_()]

    def second() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(_functions()[name](*inputs).sum(), inputs, create_graph=True)
        return *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    found = second()
    with clipfast.backend("reference"):
        for a, b in zip(found, second(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
@pytest.mark.parametrize("name", _functions())
def test_transforms_and_subclasses_are_pytorchs(name: str) -> None:
    """They ask for a derivative, or a meaning, that the operators have not got."""
    function, x, w = _functions()[name], random(0, 5, 16), random(1, 16)
    plain = function(x, w)
    for _ in range(2):  # a choice that is kept for plain tensors is not theirs
        torch.testing.assert_close(torch.func.vmap(lambda x: function(x, w))(x), plain)
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(function(leaf, w).sum(), leaf)[0]
        torch.testing.assert_close(torch.func.grad(lambda x: function(x, w).sum())(x), expected)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(x, torch.ones_like(x)), w)).tangent
            assert tangent is not None

    class Named(Tensor):
        pass

    assert type(function(x.as_subclass(Named), w)) is Named
    assert "Named" in str(native_rows.refusal(x.as_subclass(Named)))
    assert "float64" in str(native_rows.refusal(x.double()))
    assert "sparse" in str(native_rows.refusal(x.to_sparse()))
    assert "meta" in str(native_rows.refusal(x.to("meta")))
    assert function(x.double(), w.double()).dtype == torch.float64


def operator_calls() -> list[tuple[str, tuple]]:
    x, d, weight, statistics = random(0, 6, 24), random(1, 6, 24), random(2, 24), random(3, 2, 6).square()
    half, single = torch.float16, torch.float32
    return [
        ("native_layer_norm", (x.bfloat16(), weight, weight, 1e-5)),
        ("native_layer_norm_backward", (d, x, weight.half(), statistics)),
        ("native_add_layer_norm", (x.half(), d, weight, weight, 1e-5)),
        ("native_add_layer_norm_backward", (d, d, x, weight, statistics, half, single, half)),
        ("native_add_layer_norm_backward", (d, d, x, weight, statistics, single, single, None)),
        ("native_bias_gelu", (x, weight, 1)),
        ("native_bias_gelu", (x.bfloat16(), None, 2)),
        ("native_bias_gelu_backward", (d, x, weight.half(), 0)),
        ("native_bias_gelu_backward", (d, x, None, 2)),
    ]


@pytest.mark.parametrize("case", range(len(operator_calls())), ids=[name for name, _ in operator_calls()])
def test_opcheck(case: int) -> None:
    name, arguments = operator_calls()[case]
    torch.library.opcheck(getattr(torch.ops.clipfast, name).default, arguments)


def test_operators_refuse_what_does_not_fit() -> None:
    x, weight, calls = random(0, 6, 24), random(1, 24), torch.ops.clipfast
    with pytest.raises(RuntimeError, match="expected float32, bfloat16 or float16"):
        calls.native_layer_norm(x.double(), weight, weight, 1e-5)
    with pytest.raises(RuntimeError, match="parameter of 24 elements, got 23"):
        calls.native_bias_gelu(x, weight[1:], 0)
    with pytest.raises(RuntimeError, match=r"native_bias_gelu\(form\): got 3"):
        calls.native_bias_gelu(x, weight, 3)
    with pytest.raises(RuntimeError, match=r"\(statistics\): expected float32 \[2, 6\]"):
        calls.native_layer_norm_backward(x, x, weight, torch.zeros(2, 5))
    with pytest.raises(RuntimeError, match=r"\(dy\): expected the shape and dtype of x"):
        calls.native_bias_gelu_backward(x.half(), x, weight, 0)


def together(x: Tensor, weight: Tensor) -> Tensor:
    # of two tensors, since a compiler takes none twice
    y, stream = ops.add_layer_norm(x, 2 * x, weight, weight + 1)
    return ops.bias_gelu(ops.layer_norm(y, weight, weight + 1), weight, "quick") + stream


def test_compile_and_checkpoint() -> None:
    inputs, d = (random(0, 6, 64), random(1, 64)), (random(2, 6, 64),)
    expected = results(together, inputs, d)
    compiled = torch.compile(together, fullgraph=True, backend="aot_eager", dynamic=True)
    again = results(lambda *t: checkpoint(together, *t, use_reentrant=False), inputs, d)
    for found in (results(compiled, inputs, d), again):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    longer = (random(3, 9, 64), inputs[1])
    assert all(
        map(torch.equal, results(compiled, longer, (random(4, 9, 64),)), results(together, longer, (random(4, 9, 64),)))
    )


def test_autocast_changes_nothing() -> None:
    inputs, d = (random(0, 6, 64), random(1, 64)), (random(2, 6, 64),)
    expected = results(together, inputs, d)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(together, inputs, d)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# the choice


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large, weight = random(0, 8, 64), random(0, 2048, 64), random(1, 64)

    def chosen(x: Tensor) -> list[str]:
        calls = (
            ("layer_norm", (x, weight, weight)),
            ("add_layer_norm", (x, x, weight, weight)),
            ("bias_gelu", (x, weight)),
        )
        return [dispatch.chosen(op, *arguments) for op, arguments in calls]

    with clipfast.backend("auto"):
        assert chosen(large) == ["native"] * 3
        assert kernel_adds_bias(large, weight)
        # with gradients a small LayerNorm is PyTorch's, unless results may not depend on the batch
        assert chosen(small) == ["reference", "reference", "native"]
        assert "NativeLayerNorm" in str(ops.layer_norm(small.requires_grad_(), weight, weight).grad_fn)
        assert "_LayerNorm" in str(ops.layer_norm(large.requires_grad_(), weight, weight).grad_fn)
        with clipfast.deterministic():
            assert chosen(small) == ["native"] * 3
        # and without, a float32 one alone, whatever its size
        with torch.no_grad():
            assert chosen(small) == chosen(large) == ["reference", "native", "native"]
            assert dispatch.chosen("layer_norm", large.bfloat16(), weight, weight) == "native"
        # in Triton's interpreter, which the tests have, nothing is computed that nobody asked for
        assert chosen(large.double()) == ["reference"] * 3
        monkeypatch.setattr(native_rows, "_unavailable", lambda: "the op library is away")
        dispatch.forget_choices()
        assert chosen(large) == ["reference"] * 3
        assert not kernel_adds_bias(large, weight)
        assert "the op library is away" in clipfast.explain("layer_norm", large, weight, weight)
    dispatch.forget_choices()


def test_a_cpu_without_the_instructions() -> None:
    code = """
import clipfast, torch
x = torch.zeros(2, 8)
with clipfast.backend("native"):
    clipfast.ops.bias_gelu(x)
print(torch.ops.clipfast.row_vectors())
"""
    done = run_python(code, ATEN_CPU_CAPABILITY="default")
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert "this CPU lacks the instructions (AVX2 and FMA)" in done.stderr
