"""What must hold for every model that ``clipfast.accelerate`` takes: the checks that its tests share."""

from __future__ import annotations

import copy
import inspect
import io
import re
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import tiny
import torch
import torch.distributed as dist
from acceleration import (
    Case,
    assert_close,
    assert_same_gradients,
    comparable,
    counted,
    loss_of,
)
from oracle import relative_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import clipfast
from clipfast.modules import transformer


def check_outputs_and_gradients(case: Case) -> None:
    model, original = case.pair()
    with counted() as calls:
        outputs = case.call(model)
    assert len(calls) == case.towers
    expected = case.call(original)
    assert_close(outputs, comparable(case, expected), 1e-12)
    loss_of(outputs).backward()
    loss_of(comparable(case, expected)).backward()
    assert_same_gradients(model, original)
    with torch.no_grad():
        assert_close(case.call(model.eval()), comparable(case, case.call(original.eval())), 1e-12)


def check_float32_outputs(case: Case) -> None:
    model, original = case.pair(torch.float32)
    exact = copy.deepcopy(original).double()
    with torch.no_grad():
        outputs = case.call(model, torch.float32)
        expected = comparable(case, case.call(original, torch.float32))
        oracle = comparable(case, case.call(exact))
    for a, e, o in zip(outputs, expected, oracle, strict=True):
        assert a.dtype == e.dtype == torch.float32
        assert relative_error(a, o) <= max(2 * relative_error(e, o), 2e-6)


def check_checkpointed_gradients(case: Case) -> None:
    model, original = case.pair()
    for m in (model, original):
        if hasattr(m, "set_grad_checkpointing"):
            m.set_grad_checkpointing()
        else:
            m.gradient_checkpointing_enable({"use_reentrant": False})
    module = "clipfast.modules.transformer.checkpoint"
    with mock.patch(module, side_effect=torch.utils.checkpoint.checkpoint) as checkpoint:
        outputs = case.call(model)
    assert checkpoint.called
    loss_of(outputs).backward()
    loss_of(comparable(case, case.call(original))).backward()
    assert_same_gradients(model, original)


def check_same_state(case: Case) -> None:
    torch.manual_seed(0)
    model = case.make()
    before = {k: (v, v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()}
    names = [n for n, _ in model.named_modules()]
    text = repr(model)
    signatures = [signatures_of(m) for m in model.modules()]
    case.call(clipfast.accelerate(model, **case.options), torch.float32)
    assert [signatures_of(m) for m in model.modules()] == signatures
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for key, (value, pointer) in before.items():
        assert after[key] is value or not isinstance(value, nn.Parameter), key
        assert after[key].data_ptr() == pointer, key
    assert [n for n, _ in model.named_modules()] == names
    assert repr(model) == text


def signatures_of(module: nn.Module) -> list[list[tuple[str, Any]]]:
    """Return names and defaults of the arguments of the methods that acceleration overrides."""
    methods = [getattr(module, name, None) for name in ("forward", "encode_text", "forward_features")]
    return [[(p.name, p.default) for p in inspect.signature(m).parameters.values()] for m in methods if m is not None]


def train(case: Case, model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = [t for t in case.call(model) if t.dim() < 3]
        loss = loss_of(outputs) / sum(t.numel() for t in outputs)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check_training(case: Case) -> None:
    model, original = case.pair()
    expected = train(case, original)
    assert len(set(expected)) == 5
    assert train(case, model) == pytest.approx(expected, rel=1e-10)


def check_saved_and_loaded(case: Case) -> None:
    model, original = case.pair()
    train(case, model, 1)
    expected = case.call(model)
    state = reloaded(model.state_dict(), weights_only=True)
    original.load_state_dict(state)
    assert_close(expected, comparable(case, case.call(original)), 1e-12)
    whole = reloaded(model, weights_only=False)
    assert type(whole) is type(model)
    with counted() as calls:
        assert_close(case.call(whole), expected, 0)
    assert len(calls) == case.towers
    clipfast.restore(whole)
    assert type(whole) is type(original)


def reloaded(value: Any, weights_only: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


def check_loaded_by_assignment(case: Case) -> None:
    model, original = case.pair()
    state = {k: 1.1 * v if v.is_floating_point() else v for k, v in original.state_dict().items()}
    case.call(model)
    for m in (model, original):
        m.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    outputs, expected = case.call(model), comparable(case, case.call(original))
    assert_close(outputs, expected, 1e-12)
    loss_of(outputs).backward()
    loss_of(expected).backward()
    assert_same_gradients(model, original)


def check_copied(case: Case) -> None:
    model, _ = case.pair()
    expected = case.call(model)
    twin = copy.deepcopy(model)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in twin.parameters()}
    with counted() as calls:
        assert_close(case.call(twin), expected, 0)
    assert len(calls) == case.towers
    loss_of(case.call(twin)).backward()
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert_close(case.call(model), expected, 0)
    assert relative_error(case.call(twin)[0], expected[0]) > 1e-3


def check_ddp(case: Case) -> None:
    model, original = case.pair()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with counted() as calls:
            loss_of(case.call(DistributedDataParallel(model))).backward()
        assert len(calls) == case.towers
    finally:
        dist.destroy_process_group()
    loss_of(comparable(case, case.call(original))).backward()
    assert_same_gradients(model, original)


def check_compiled(case: Case) -> None:
    model, original = case.pair()
    torch._dynamo.reset()
    with counted() as calls:
        outputs = case.call(torch.compile(model, backend="aot_eager", fullgraph=True))
    assert len(calls) == case.towers
    expected = comparable(case, case.call(original))
    assert_close(outputs, expected, 1e-12)
    loss_of(outputs).backward()
    loss_of(expected).backward()
    assert_same_gradients(model, original)


def first_norm(model: nn.Module) -> nn.Module:
    """Return a LayerNorm inside the first block of a tower."""
    return next(m for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) and re.search(r"[._]0\.", n))


def check_hooked(case: Case) -> None:
    model, original = case.pair()
    seen = []
    handle = first_norm(model).register_forward_hook(lambda module, args, output: seen.append(output))
    with counted() as calls:
        outputs = case.call(model)
    assert len(calls) == case.towers - 1
    assert len(seen) == 1
    assert seen[0].dim() == 3
    if case.towers == 1:
        assert_close(outputs, case.call(original), 0)
    handle.remove()
    with counted() as calls:
        case.call(model)
    assert len(calls) == case.towers


class _OtherNorm(nn.LayerNorm):
    pass


def check_changed(case: Case) -> None:
    model, original = case.pair()
    for m in (model, original):
        norm = first_norm(m)
        norm.__class__ = _OtherNorm
    with counted() as calls, pytest.warns(clipfast.models.accelerate.AccelerateWarning, match="_OtherNorm"):
        outputs = case.call(model)
    assert len(calls) == case.towers - 1
    if case.towers == 1:
        assert_close(outputs, case.call(original), 0)
    assert "_OtherNorm" in str(clipfast.acceleration(model)) or "changed" in str(clipfast.acceleration(model))
    for m in model.modules():
        if isinstance(m, _OtherNorm):
            m.__class__ = type(next(n for n in original.modules() if isinstance(n, nn.LayerNorm) and n is not norm))
    clipfast.accelerate(model, **case.options)
    with counted() as calls:
        case.call(model)
    assert len(calls) == case.towers


def check_restored(case: Case) -> None:
    torch.manual_seed(0)
    model = case.make().double()
    assert clipfast.restore(model) is model
    before = [(type(m), list(m.__dict__)) for m in model.modules()]
    expected = case.call(model)
    assert clipfast.accelerate(model, **case.options) is model
    classes = [type(m) for m in model.modules()]
    assert isinstance(model, before[0][0])
    assert clipfast.accelerate(model, **case.options) is model
    assert [type(m) for m in model.modules()] == classes
    assert classes != [c for c, _ in before]
    case.call(model)
    assert clipfast.restore(model) is model
    assert [(type(m), list(m.__dict__)) for m in model.modules()] == before
    with counted() as calls:
        assert_close(case.call(model), expected, 0)
    assert not calls


def check_freed(case: Case) -> None:
    """A model that is no longer used frees its memory at once, not when garbage is collected."""
    model, _ = case.pair(torch.float32)
    case.call(model, torch.float32)
    alive = [weakref.ref(part) for part in (model, *model.parameters())]
    del model
    assert not [ref for ref in alive if ref() is not None]


def check_packed_inference(case: Case) -> None:
    """Inference on the CPU takes the packed encoder where clipfast's own towers take it."""
    with torch.no_grad():
        served = tiny.vit().transformer.packed_encoder(torch.randn(1, 5, 64)) is not None
    if not served:
        pytest.skip("clipfast's own towers do not take the packed encoder here")
    model, original = case.pair(torch.float32)
    encode, calls = transformer.encode, []

    def count(x: Tensor, encoder: Any, **kwargs: Any) -> Tensor:
        # one tower may encode what it pools, and once more all tokens when they are read
        calls.append(encoder)
        return encode(x, encoder, **kwargs)

    with torch.no_grad(), mock.patch.object(transformer, "encode", count):
        outputs = case.call(model, torch.float32)
        assert len(set(calls)) == case.towers
        assert_close(outputs, comparable(case, case.call(original, torch.float32)), 2e-6)
        for m in (model, original):
            for p in m.parameters():
                p.mul_(1.1)
        outputs = case.call(model, torch.float32)
        assert_close(outputs, comparable(case, case.call(original, torch.float32)), 2e-6)


def check_dropout(case: Case) -> None:
    """A model that drops values at random runs its original code in training, and is served in ``eval()``."""
    model, original = case.pair()
    with counted() as calls:
        assert_close(case.call(model), case.call(original), 0)
        assert not calls
        assert_close(case.call(model.eval()), case.call(original.eval()), 1e-12)
    assert len(calls) == 1


COMMON: tuple[Callable[[Case], None], ...] = (
    check_outputs_and_gradients,
    check_float32_outputs,
    check_same_state,
    check_training,
    check_saved_and_loaded,
    check_copied,
    check_restored,
)
# on one case of every family
RARE: tuple[Callable[[Case], None], ...] = (
    check_compiled,
    check_loaded_by_assignment,
    check_ddp,
    check_hooked,
    check_changed,
    check_freed,
    check_packed_inference,
)


def parametrize(cases: list[Case], checks: tuple[Callable[[Case], None], ...]) -> pytest.MarkDecorator:
    """Return the mark that runs every check on every case."""
    torch.set_num_threads(1)  # more take longer for models as small as these
    return pytest.mark.parametrize(
        ("check", "case"),
        [
            pytest.param(check, case, id=f"{check.__name__.removeprefix('check_')}-{case.name}")
            for case in cases
            for check in checks
        ],
    )
