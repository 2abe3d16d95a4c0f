"""One call by every backend that can serve it: checked against float64, then timed in turn."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipfast.benchmark.timing import Clock, Interleaved
from clipfast.ops import dispatch, fallback, numerics
from clipfast.ops.encoder import PackedEncoder
from clipfast.tuning import decide
from clipfast.tuning.cases import Call, tensors_of, with_tensors
from clipfast.tuning.decide import Times

ROUNDS = 21
"""Of a call that may change something: with 5% noise they show a lead of 20%, and in half of all cases one of 10%."""
# after so many rounds, a side that takes so many times as long in each of them is given up; later, one without hope
_FAR = {1: 3.0, 3: 1.5}
_LOOKS = (5, 9, 13)
# how much rotating inputs take at least: more than a cache holds, where the model's own weights and activations do
_CACHE = {"cuda": 256 * 2**20, "cpu": 48 * 2**20}
_MOST_SETS = 8
_NO_MEMORY = "there was no memory for its check"


@dataclass(frozen=True)
class Measured:
    """What became of a call.

    Attributes:
        call: It.
        rule: The backend that serves it by the rule.
        sides: By backend, its times; or in words why it is out of the question.
        wrong: The backends that compute wrong results, or fail.
    """

    call: Call
    rule: str
    sides: dict[str, Times | str]
    wrong: tuple[str, ...]


def backends_of(call: Call) -> tuple[str, list[str]]:
    """Return the backend that serves a call by what decides now, and all that a tuned file may name in its place."""
    with call.surroundings():
        chosen = dispatch.chosen(call.op, *call.args, **call.kwargs)
        able = dispatch.able(call.op, *call.args, **call.kwargs)
    named = [name for name in able if name in dispatch.plannable(call.op) and not _grows(call, name)]
    return chosen, [chosen, *(name for name in named if name != chosen)]


def _grows(call: Call, backend: str) -> bool:
    """Return whether a backend's memory grows where others' does not: it holds attention's weights of any length."""
    return call.op == "attention" and backend == "reference" and len(tensors_of(call)) > 1


def measure(call: Call, seconds: float, new_clock: Callable[[str], Clock] = Clock) -> Measured:
    """Check and time a call by every backend that can serve it.

    Args:
        call: The call.
        seconds: About how long the rounds may take. A call that does not fit gets fewer than decide anything.
        new_clock: Makes the clock of a kind of device.

    Raises:
        Exception: The device's state is lost.
    """
    rule, able = backends_of(call)
    with warnings.catch_warnings():
        # ops that a backend calls in its turn may have no such implementation
        warnings.simplefilter("ignore", dispatch.FallbackWarning)
        wrong = complaints(call, able) if len(able) > 1 else {}
        sides: dict[str, Times | str] = dict(wrong)
        right = [name for name in able if name not in wrong]
        if len(right) > 1:
            sides |= _time(call, rule if rule in right else right[0], right, seconds, new_clock)
        else:
            sides |= {name: Times([], []) for name in right}
    return Measured(call, rule, sides, tuple(name for name, why in wrong.items() if why != _NO_MEMORY))


# ----------------------------------------------------------------------------------------------------------------------
# right or wrong


def complaints(call: Call, backends: Sequence[str]) -> dict[str, str]:
    """Return what is wrong with backends' results and gradients for a call, of those that are wrong."""
    found: dict[str, str] = {}
    try:
        oracle, reference = _compute(_exact(call), "reference"), _compute(call, "reference")
    except torch.OutOfMemoryError:
        return dict.fromkeys(backends, _NO_MEMORY)
    scales = _scales(call)
    for name in backends:
        try:
            error, allowed = numerics.worst(_compute(call, name), reference, oracle, scales)
        except torch.OutOfMemoryError:
            found[name] = _NO_MEMORY
        except Exception as failure:
            if fallback.is_final(failure):
                raise
            found[name] = f"failed: {fallback.in_words(failure)}"
        else:
            if not error <= allowed:
                found[name] = f"computes wrong results: the error is {error:.1e}, at most {allowed:.1e} is allowed"
    return found


def _compute(call: Call, backend: str) -> list[Tensor]:
    """Return outputs and gradients."""
    with call.surroundings(), dispatch.backend(backend):
        return [t.detach() for t in _runner(call)()]


def _runner(call: Call) -> Callable[[], list[Tensor]]:
    """Return a function that makes the call, and returns outputs and the gradients that were wanted."""
    tensors = tensors_of(call)
    leaves = [tensors[i].detach().requires_grad_() for i in call.wanted]
    for i, leaf in zip(call.wanted, leaves, strict=True):
        tensors[i] = leaf
    ready = with_tensors(call, tensors)
    cotangents: list[Tensor] = []

    def run() -> list[Tensor]:
        outputs = dispatch.call(ready.op, *ready.args, **ready.kwargs)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if not leaves:
            return outputs
        if not cotangents:
            cotangents.extend(_cotangent(y) for y in outputs)
        gradients = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
        return [*outputs, *(g for g in gradients if g is not None)]

    return run


def _cotangent(y: Tensor) -> Tensor:
    if y.dim() == 0:
        return torch.ones_like(y)
    # the same numbers in every dtype
    generator = torch.Generator().manual_seed(y.numel())
    drawn = torch.randn(y.numel(), generator=generator, dtype=torch.float32).bfloat16()
    return drawn.reshape(y.shape).to(y.device, y.dtype)


def _exact(call: Call) -> Call:
    """Return the call in float64, out of autocast."""
    doubled = [t.double() if t.is_floating_point() else t for t in tensors_of(call)]
    call = replace(with_tensors(call, doubled), autocast=None)
    return replace(call, args=tuple(_exact_encoder(a) if isinstance(a, PackedEncoder) else a for a in call.args))


def _exact_encoder(encoder: PackedEncoder) -> PackedEncoder:
    blocks = [block.to(torch.float64) for block in encoder.blocks]
    return PackedEncoder(blocks, encoder.heads, encoder.causal, encoder.approximate, encoder.eps, torch.float64)


def _scales(call: Call) -> Sequence[float] | None:
    """Return the natural scales of a loss and its gradients, whose largest values are none (docs/numerics.md)."""
    if call.op not in ("contrastive_loss", "siglip_loss"):
        return None
    images, _, scale = tensors_of(call)[:3]
    pairs = images.shape[0]
    whole = 1.0 if call.op == "contrastive_loss" else float(pairs)
    of_features = whole * float(scale) / pairs
    return whole, of_features, of_features, whole


# ----------------------------------------------------------------------------------------------------------------------
# fast or slow


def _time(
    call: Call, base: str, backends: list[str], seconds: float, new_clock: Callable[[str], Clock]
) -> dict[str, Times]:
    sets = [(_runner(copy),) for copy in _copies(call)]

    def side(backend: str) -> Callable[..., object]:
        def run(runner: Callable[[], object]) -> object:
            with dispatch.backend(backend):
                return runner()

        return run

    with call.surroundings():
        sides = {name: side(name) for name in backends}
        for run in sides.values():
            # the check has called them with the first
            run(*sets[-1])
        timed = Interleaved(new_clock(call.device.type), sides, sets)
        rounds = ROUNDS if timed.round_s * ROUNDS <= seconds else decide.LEAST_ROUNDS
        return play(timed, base, rounds, seconds)


def play(timed: Interleaved, base: str, rounds: int, seconds: float) -> dict[str, Times]:
    """Time so many rounds of all sides, but of those without hope fewer, and none when the time is over.

    Returns:
        Each side's times. A side that was given up has fewer rounds; the first of the base's are those that it ran in.
    """
    found: dict[str, Times] = {}
    until = time.monotonic() + seconds
    for done in range(1, rounds + 1):
        timed.round()
        for name in [n for n in timed.sides if n != base]:
            mine, other = (Times(list(timed.device_s[n]), list(timed.host_s[n])) for n in (base, name))
            far = done in _FAR and min(other.cost) > _FAR[done] * max(mine.cost)
            if far or (done in _LOOKS and decide.is_hopeless(mine, other)):
                found[name] = other
                del timed.sides[name]
        if len(timed.sides) == 1 or time.monotonic() > until:
            break
    return {n: Times(timed.device_s[n], timed.host_s[n]) for n in timed.sides} | found


def _copies(call: Call) -> list[Call]:
    """Return the call with several sets of tensors, so that what one round reads the cache does not hold."""
    tensors = tensors_of(call)
    size = max(1, sum(t.numel() * t.element_size() for t in tensors))
    count = max(1, min(_MOST_SETS, _CACHE[call.device.type] // size)) if call.device.type in _CACHE else 1
    return [call, *(with_tensors(call, [_copy(t) for t in tensors]) for _ in range(count - 1))]


def _copy(tensor: Tensor) -> Tensor:
    # offsets of packed sequences are known by the tensor that holds them
    return tensor if not tensor.is_floating_point() else tensor.clone(memory_format=torch.preserve_format)
