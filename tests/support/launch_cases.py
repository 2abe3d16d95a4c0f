"""Every launch is of the kernel that Triton itself would have launched; ``tests/kernels/test_launch.py`` runs these."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import mocked_driver
import pytest
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

import clipfast
from clipfast import ops
from clipfast.kernels import launch
from clipfast.ops import capturing, fallback, kernel_ops

tl = triton.language
LIMIT = 7


def function(
    x, y, count, stride, turned, factor, flag, SIZE: tl.constexpr, FORM: tl.constexpr = "a", MORE: tl.constexpr = LIMIT
):
    """Take arguments of every kind."""
    tl.store(y, tl.load(x + stride) * factor)


SPECIALISATION = {"do_not_specialize": ["count"], "do_not_specialize_on_alignment": ["turned"]}

memory = torch.zeros(64)
POINTERS = [
    memory,
    memory[4:],
    memory[1:],
    memory[8:].view(2, 28),
    memory.to(torch.bfloat16),
    memory.to(torch.bfloat16)[1:],
    memory.to(torch.int32),
    torch.nn.Parameter(memory),
    None,
]
INTEGERS = [0, 1, 2, 16, 17, -1, -16, 2**31 - 1, 2**31, -(2**31) - 1, 2**31 - 16, 2**32, 2**63, True, False, 1.0, 0.5]
FLOATS = [0.5, 1.0, 1, 16, 0.0, True]
CONSTANTS = [(64,), (64, "b"), (64, "b", 9), (1,), (16.0,)]
NAMED = [{}, {"num_warps": 8}, {"num_warps": 8, "num_stages": 1}, {"num_stages": 1, "num_warps": 8}, {"debug": True}]


def calls() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Return all pairs of what each argument may be, the others as they usually are, each several times."""
    usual = (memory, memory, 5, 16, 3, 0.5, False)
    kinds = [POINTERS, POINTERS, INTEGERS, INTEGERS, INTEGERS, FLOATS, INTEGERS]
    found = []
    for (i, first), (j, second) in itertools.combinations(enumerate(kinds), 2):
        for a, b in itertools.product(first, second):
            arguments = list(usual)
            arguments[i], arguments[j] = a, b
            found.append(((*arguments, 64), {"num_warps": 8}))
    for constants, named in itertools.product(CONSTANTS, NAMED):
        found += [((*usual, *constants), named), ((*usual[:3], 1, *usual[4:], *constants), named)]
    # constants by name
    found += [((*usual,), {"SIZE": size, "FORM": form, "num_warps": 4}) for size in (1, 16) for form in ("a", "c")]
    return found


def compare(quick: Any, oracle: Any, order: list[tuple[tuple[Any, ...], dict[str, Any]]]) -> int:
    """Launch everything by both, on two devices; return how many launches were not Triton's own."""
    before = Counted.launches
    for number, (arguments, named) in enumerate(order):
        mocked_driver.device = number % 2
        grid = ((number,), (number, 2), (3, number, 4))[number % 3]
        launched = []
        for kernel in (oracle, quick):
            mocked_driver.launches.clear()
            problem = None
            try:
                kernel[grid](*arguments, **named)
            except Exception as error:
                problem = type(error)
            launched.append((problem, list(mocked_driver.launches)))
        (problem, expected), (other, actual) = launched
        assert problem == other, (arguments, named)
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert a.specialised == b.specialised, (arguments, named)
            assert [type(c) for c in a.specialised.constants.values()] == [
                type(c) for c in b.specialised.constants.values()
            ]
            assert (a.grid, a.stream) == (b.grid, b.stream)
            assert all(x is y for x, y in zip(a.arguments, b.arguments, strict=True)), (arguments, named)
    mocked_driver.device = 0
    return 2 * len(order) - (Counted.launches - before)


class Counted:
    """Counts Triton's own launches."""

    launches = 0


@pytest.fixture(autouse=True)
def _count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    run = JITFunction.run

    def counted(self: Any, *arguments: Any, **named: Any) -> Any:
        Counted.launches += 1
        return run(self, *arguments, **named)

    monkeypatch.setattr(JITFunction, "run", counted)
    mocked_driver.launches.clear()
    yield
    mocked_driver.error = None


def shuffled() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    order = calls() * 3
    random.Random(0).shuffle(order)
    return order


def made() -> tuple[Any, Any]:
    return launch.jit(function, **SPECIALISATION), triton.jit(function, **SPECIALISATION)


def test_every_launch_is_tritons() -> None:
    order = shuffled()
    spared = compare(*made(), order)
    # of three times everything on two devices, more than a third was known
    assert spared > len(order) / 3


class Unnoticed(tuple):
    """Says that it is all of what Triton's binder found, which is asked for at a first launch."""

    def __eq__(self, other: object) -> bool:
        return not isinstance(other, Unnoticed) or super().__eq__(other)

    __hash__ = tuple.__hash__


def without(part: int, change: Callable[[Any], Any]) -> Callable[..., Any]:
    key = launch.Kernel._key

    def planted(self: Any, *arguments: Any) -> tuple[Any, ...]:
        parts = list(key(self, *arguments))
        parts[part] = Unnoticed(change(parts[part]))
        return tuple(parts)

    return planted


PLANTED = {
    "alignment": (0, lambda specialised: tuple(kind for kind, _ in specialised)),
    "dtypes": (0, lambda specialised: tuple(value for _, value in specialised)),
    "first pointer": (0, lambda specialised: specialised[1:]),
    "last number": (0, lambda specialised: specialised[:-1]),
    "constants": (1, lambda constants: constants[1:]),
    "options": (2, lambda named: tuple(name for name, _ in named)),
}


@pytest.mark.parametrize(("part", "change"), PLANTED.values(), ids=PLANTED)
def test_the_comparison_sees_a_key_that_forgets(part: int, change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Kernel, "_key", without(part, change))
    with pytest.raises(AssertionError):
        compare(*made(), shuffled())


def test_a_key_that_forgets_is_noticed_at_the_first_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    key = launch.Kernel._key
    monkeypatch.setattr(launch.Kernel, "_key", lambda *arguments: (key(*arguments)[0][:-1], *key(*arguments)[1:]))
    assert compare(*made(), shuffled()[:400]) == 0


def test_the_comparison_sees_devices_that_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class One(dict):
        def get(self, key: int, default: Any = None) -> Any:
            return super().get(0, default)

        def __setitem__(self, key: int, value: Any) -> None:
            super().__setitem__(0, value)

    quick, oracle = made()
    quick._known, quick.device_caches = One(), One({0: quick.create_binder()})
    with pytest.raises((AssertionError, KeyError)):
        compare(quick, oracle, shuffled())


ARGUMENTS = (memory, memory, 5, 16, 3, 0.5, False, 64)


def launched(kernel: Any, *arguments: Any, **named: Any) -> bool:
    """Launch a kernel, and return whether Triton did it."""
    before = Counted.launches
    kernel[(1,)](*(arguments or ARGUMENTS), **named)
    return Counted.launches > before


@pytest.fixture
def known() -> Any:
    kernel = made()[0]
    assert launched(kernel)
    assert not launched(kernel)
    return kernel


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(hook: str, known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    chain = getattr(knobs.runtime, hook)
    chain.add(seen.append)
    assert launched(known)
    assert mocked_driver.launches[-1].hooks[1 if "enter" in hook else 2] is chain
    chain.remove(seen.append)
    assert not launched(known)
    # a hook may also be set as it is, or taken away
    monkeypatch.setattr(knobs.runtime, hook, seen.append)
    assert launched(known)
    assert seen if "enter" in hook else not seen
    monkeypatch.setattr(knobs.runtime, hook, None)
    assert not launched(known)


def test_hooks_of_one_kernel(known: Any) -> None:
    seen = []
    known.add_pre_run_hook(lambda *arguments, **named: seen.append(arguments))
    assert launched(known)
    assert len(seen[0]) == len(ARGUMENTS)


def test_settings_of_triton(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "debug", True)
    assert launched(known)
    assert mocked_driver.launches[-1].specialised.options["debug"]
    assert not launched(known)
    monkeypatch.setattr(knobs.runtime, "debug", False)
    assert not launched(known)
    assert not mocked_driver.launches[-1].specialised.options["debug"]
    monkeypatch.setattr(known, "debug", True)
    launched(known)
    assert mocked_driver.launches[-1].specialised.options["debug"]


def test_a_pipeline_that_somebody_inspects(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", lambda *_: ("key", "hash"))
    assert launched(known)


def test_a_global_that_changed(known: Any) -> None:
    known.used_global_vals = {("LIMIT", 0): (LIMIT, globals())}
    assert not launched(known)
    known.used_global_vals = {("LIMIT", 0): (LIMIT + 1, globals())}
    with pytest.raises(RuntimeError, match="Global variable LIMIT"):
        launched(known)


def test_another_driver(known: Any) -> None:
    known.device_caches.clear()
    assert launched(known)
    assert not launched(known)


def test_grids(known: Any) -> None:
    known[lambda bound: (bound["count"], 2)](*ARGUMENTS)
    assert mocked_driver.launches[-1].grid == (5, 2, 1)
    for grid in ((4,), [4], (4, 1), (4, 1, 1)):
        before = Counted.launches
        known[grid](*ARGUMENTS)
        assert mocked_driver.launches[-1].grid == (4, 1, 1)
        assert Counted.launches == before


def test_what_a_launch_raises(known: Any) -> None:
    mocked_driver.error = RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launched(known)


@pytest.mark.parametrize("version", ["3.5.1", "3.10.0", "4.0.0", "main"])
def test_versions_that_nobody_looked_at(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "__version__", version)
    kernel = made()[0]
    assert launched(kernel)
    assert launched(kernel)
    assert all(launch.is_known_version(v) for v in ("3.6.0", "3.9.0", "3.7.0+git1234"))


def test_a_triton_that_binds_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_specialize", lambda *arguments: ("i32", None))
    kernel = made()[0]
    assert launched(kernel)
    assert launched(kernel)
    compare(kernel, made()[1], shuffled()[:500])


# ----------------------------------------------------------------------------------------------------------------------
# clipfast's own kernels


def _shift(x: Tensor) -> Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


OPS: dict[str, Callable[..., Any]] = {
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones(64), torch.zeros(64)),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x.float(), torch.ones(64), torch.zeros(64)),
    "bias_gelu": lambda x: ops.bias_gelu(x, torch.zeros(64), "tanh"),
    "attention": lambda x: ops.attention(x.repeat(1, 3)[None], 2),
}


@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_ops, "_unavailable", lambda *_: None)
    fallback.forget()

    def step(x: Tensor) -> list[Any]:
        mocked_driver.launches.clear()
        out = OPS[op](x.detach().requires_grad_())
        out = out if isinstance(out, tuple) else (out,)
        sum(o.float().sum() for o in out).backward()
        return [launch.specialised for launch in mocked_driver.launches]

    with clipfast.backend("triton"):
        first = step(torch.randn(9, 64))
        before = Counted.launches
        assert step(torch.randn(16, 64)) == first
        assert len(first) >= 2
        assert Counted.launches == before, "Triton launched again"
        other = step(torch.randn(9, 64, dtype=torch.bfloat16))
        assert other != first
        shifted = step(_shift(torch.randn(9, 64)))
        if op != "attention":  # which copies what is not aligned
            assert shifted != first
        assert step(torch.randn(40, 64)) == first
    assert not fallback.failures()


def test_nothing_is_compiled_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knobs.runtime, "jit_cache_hook", None)
    capturing.forbid_compilation.cache_clear()
    capturing.forbid_compilation()
    kernel = made()[0]
    kernel.module = "clipfast.kernels.probe"
    function.__module__, module = "clipfast.kernels.probe", function.__module__
    try:
        assert launched(kernel)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert not launched(kernel)
        with pytest.raises(fallback.NotReady):
            launched(kernel, memory[1:], *ARGUMENTS[1:])
    finally:
        function.__module__ = module


def test_a_block_is_ready_for_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it ran, a tower launches the same kernels under capture, forward and backward, and compiles nothing."""
    monkeypatch.setattr(kernel_ops, "_unavailable", lambda *_: None)
    fallback.forget()
    torch.manual_seed(0)
    tower = clipfast.ViT(32, 8, 64, layers=2, heads=2, output_dim=32)
    pictures = torch.randn(3, 3, 32, 32)

    def step() -> list[Any]:
        mocked_driver.launches.clear()
        tower(pictures).sum().backward()
        return [launch.specialised for launch in mocked_driver.launches]

    with clipfast.backend("triton"):
        first = step()
        assert len({specialised.name for specialised in first}) > 5
        capturing.forbid_compilation()
        before, compiled = Counted.launches, len(mocked_driver.compiled)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert step() == first
    assert (Counted.launches, len(mocked_driver.compiled)) == (before, compiled)
    assert not fallback.failures()
