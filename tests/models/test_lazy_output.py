"""Outputs of transformers' text towers whose tokens are computed when they are read."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import transformers
from acceleration import assert_close, counted, tensors_of
from rivals import captions
from torch import Tensor, nn
from torch.utils import _pytree
from transformers.modeling_outputs import BaseModelOutputWithPooling

import clipfast
from clipfast.modules import inference

IDS = captions(5, 16, 100)
ENDS = (IDS == 99).int().argmax(dim=-1)
MASK = (torch.arange(16) <= ENDS[:, None]).long()
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))


TEXT = partial(tiny.transformers_text, False)


def pair(dtype: torch.dtype = torch.float64, make: Callable[[], nn.Module] = TEXT) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    original = make().to(dtype).eval()
    return clipfast.accelerate(copy.deepcopy(original)), original


def is_waiting(output: Any) -> bool:
    return type(output) is not BaseModelOutputWithPooling


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", [None, MASK, MASK.bool(), MASK.float(), torch.ones_like(MASK)])
def test_everything_is_what_the_original_gives(mask: Tensor | None, dtype: torch.dtype) -> None:
    model, original = pair(dtype)
    with torch.no_grad():
        expected = original(input_ids=IDS, attention_mask=mask)
        oracle = copy.deepcopy(original).double()(input_ids=IDS, attention_mask=mask)
        output = model(input_ids=IDS, attention_mask=mask)
    assert isinstance(output, BaseModelOutputWithPooling)
    assert is_waiting(output)
    for name in ("pooler_output", "last_hidden_state"):
        actual, reference, exact = (getattr(o, name) for o in (output, expected, oracle))
        assert actual.dtype == reference.dtype
        error, bound = ((t.double() - exact).abs().max() for t in (actual, reference))
        assert error <= max(2 * bound + 2 * torch.finfo(dtype).eps * exact.abs().max(), 1e-12), name
    assert not is_waiting(output)
    # transformers' own code computes those that a mask hides
    if mask is not None and not mask.all():
        assert torch.equal(output.last_hidden_state, expected.last_hidden_state)


def test_what_is_not_read_is_not_computed() -> None:
    model, original = pair(make=tiny.transformers_clip)
    arguments = {"input_ids": IDS[:2], "pixel_values": PIXELS.double(), "attention_mask": MASK[:2], "return_loss": True}
    with torch.no_grad(), counted() as calls:
        output = model(**arguments)
        features = model.get_text_features(IDS, attention_mask=MASK)
        expected = original(**arguments)
    assert len(calls) == 3
    assert is_waiting(output.text_model_output)
    assert is_waiting(features)
    assert features.pooler_output is features["pooler_output"]
    assert features.pooler_output is features[1]
    assert list(features) == list(features.keys()) == ["last_hidden_state", "pooler_output"]
    assert len(features) == 2
    assert "last_hidden_state" in features
    assert features.hidden_states is None
    assert is_waiting(features)
    assert_close(tensors_of(output), tensors_of(expected), 1e-12)
    assert not is_waiting(output.text_model_output)
    assert len(calls) == 3


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "attribute": lambda o: o.last_hidden_state,
    "getattr": lambda o: getattr(o, "last_hidden_state", None),
    "key": lambda o: o["last_hidden_state"],
    "index": lambda o: o[0],
    "last but one": lambda o: o[-2],
    "slice": lambda o: o[:1][0],
    "get": lambda o: o.get("last_hidden_state"),
    "tuple": lambda o: o.to_tuple()[0],
    "values": lambda o: next(iter(o.values())),
    "items": lambda o: dict(o.items())["last_hidden_state"],
    "dict": lambda o: dict(o)["last_hidden_state"],
    "unpacked": lambda o: {**o}["last_hidden_state"],
    "keywords": lambda o: (lambda **named: named)(**o)["last_hidden_state"],
    "union": lambda o: (o | {})["last_hidden_state"],
    "vars": lambda o: vars(o)["last_hidden_state"],
    "copy": lambda o: copy.copy(o).last_hidden_state,
    "deepcopy": lambda o: copy.deepcopy(o).last_hidden_state,
    "method copy": lambda o: o.copy()["last_hidden_state"],
    "pickle": lambda o: pickle.loads(pickle.dumps(o)).last_hidden_state,
    "map": lambda o: _pytree.tree_map(lambda t: t, o).last_hidden_state,
    "leaves": lambda o: _pytree.tree_leaves(o)[0],
    "made anew": lambda o: type(o)((k, o[k]) for k in o).last_hidden_state,
    "equal": lambda o: (o == 3, o.last_hidden_state)[1],
    "repr": lambda o: (repr(o).index("last_hidden_state=tensor"), o.last_hidden_state)[1],
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_reading(way: str) -> None:
    model, original = pair()
    with torch.no_grad():
        output, expected = (m(input_ids=IDS, attention_mask=MASK) for m in (model, original))
    pooled = output.pooler_output
    tokens = WAYS[way](output)
    assert torch.equal(tokens, expected.last_hidden_state)
    assert type(output) is BaseModelOutputWithPooling
    assert output.pooler_output is pooled
    assert list(output) == ["last_hidden_state", "pooler_output"]
    assert torch.equal(output[0], expected[0])


def test_outputs_are_saved() -> None:
    model, original = pair()
    with torch.no_grad():
        output, expected = (m(input_ids=IDS, attention_mask=MASK) for m in (model, original))
    file = io.BytesIO()
    torch.save(output, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)[0], expected[0])


def write_attribute(output: Any, value: Tensor) -> None:
    output.last_hidden_state = value


def write_item(output: Any, value: Tensor) -> None:
    output["last_hidden_state"] = value


@pytest.mark.parametrize("write", [write_attribute, write_item])
def test_tokens_are_overwritten(write: Callable[[Any, Tensor], None]) -> None:
    model, _ = pair()
    with torch.no_grad(), counted() as calls:
        output = model(input_ids=IDS, attention_mask=MASK)
        value = torch.ones(3)
        write(output, value)
        assert output.last_hidden_state is value
        assert output[0] is value
        assert list(output) == ["last_hidden_state", "pooler_output"]
    assert len(calls) == 1


def test_the_pooled_output_is_overwritten() -> None:
    model, original = pair()
    with torch.no_grad():
        output = model(input_ids=IDS, attention_mask=MASK)
        output.pooler_output = torch.ones(3)
        assert torch.equal(output["pooler_output"], torch.ones(3))
        assert torch.equal(output[0], original(input_ids=IDS, attention_mask=MASK)[0])
        assert torch.equal(output[1], torch.ones(3))


def test_inputs_may_be_written_to_after_the_call() -> None:
    model, original = pair()
    ids, mask = IDS.clone(), MASK.clone()
    with torch.no_grad():
        expected = original(input_ids=ids, attention_mask=mask).last_hidden_state
        outputs = model(input_ids=ids, attention_mask=mask), model(input_ids=ids)
        ids.fill_(99)
        mask.fill_(1)
    assert torch.equal(outputs[0].last_hidden_state, expected)
    assert (outputs[1].last_hidden_state - original(input_ids=IDS).last_hidden_state).abs().max() < 1e-12


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu", torch.bfloat16)]
)
def test_the_context_of_the_call_counts(context: Callable[[], Any]) -> None:
    model, original = pair(torch.float32)
    for m in (model, original):
        m.requires_grad_(False)
    for mask in (None, MASK):
        with context():
            output, expected = (m(input_ids=IDS, attention_mask=mask) for m in (model, original))
        assert is_waiting(output)
        tokens = output.last_hidden_state
        assert tokens.dtype == expected.last_hidden_state.dtype
        assert tokens.is_inference() == expected.last_hidden_state.is_inference()
        assert not tokens.requires_grad
        torch.testing.assert_close(tokens, expected.last_hidden_state, atol=0.1, rtol=0.1)


def moved(model: nn.Module) -> None:
    model.float()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({k: 1.1 * v if v.is_floating_point() else v for k, v in model.state_dict().items()})


def stepped(model: nn.Module) -> None:
    model(input_ids=IDS).pooler_output.sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def hooked(model: nn.Module) -> None:
    model.encoder.layers[0].mlp.register_forward_hook(lambda *arguments: None)


@pytest.mark.parametrize("change", [moved, loaded, stepped, hooked, clipfast.restore])
def test_tokens_of_a_changed_model_are_refused(change: Callable[[nn.Module], Any]) -> None:
    model, _ = pair()
    with torch.no_grad():
        output = model(input_ids=IDS, attention_mask=MASK)
    change(model)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the model was changed since the call"):
            output.last_hidden_state  # noqa: B018
    assert output.pooler_output.shape == (5, 48)


def test_uncounted_writes_change_a_model_too() -> None:
    model, _ = pair(torch.float32, partial(tiny.transformers_text, False))
    with torch.no_grad():
        output = model(input_ids=IDS)
        if not inference._kept.get(model._clipfast_twin.tower.transformer):
            pytest.skip("nothing packs weights here")
        model.encoder.layers[1].mlp.fc1.weight.data[:96] = 0
        with pytest.raises(RuntimeError, match="the model was changed since the call"):
            output.last_hidden_state  # noqa: B018


def test_what_was_packed_of_earlier_weights_tells_nothing_of_these() -> None:
    model, original = pair(torch.float32, partial(tiny.transformers_text, False))
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(input_ids=IDS)
        for m in (model, original):
            for parameter in m.parameters():
                parameter.mul_(1.1)
        output = model(input_ids=IDS)
        assert type(output) is not type(original(input_ids=IDS))
        assert_close([output.last_hidden_state], [original(input_ids=IDS).last_hidden_state], 2e-6)


def test_weights_of_a_functional_call_are_there_for_the_call() -> None:
    model, original = pair()
    weights = {name: 1.1 * parameter.detach() for name, parameter in original.named_parameters()}
    with torch.no_grad():
        actual, expected = (torch.func.functional_call(m, weights, (IDS,)) for m in (model, original))
    assert_close([actual.last_hidden_state], [expected.last_hidden_state], 1e-12)


def test_who_reads_tokens_gets_them_at_once() -> None:
    """Otherwise everything would be computed twice, call after call."""
    model, original = pair()
    expected = original(input_ids=IDS)
    with torch.no_grad(), counted() as calls:

        def calls_of(reads: bool) -> int:
            before = len(calls)
            output = model(input_ids=IDS)
            assert_close([output.pooler_output], [expected.pooler_output.detach()], 1e-12)
            if reads:
                assert_close([output[0]], [expected[0].detach()], 1e-12)
            return len(calls) - before

        assert [calls_of(reads) for reads in (True, True, True, False, False, True, True)] == [2, 1, 1, 1, 1, 2, 1]


def test_gradients_need_all_tokens_at_once() -> None:
    model, original = pair()
    outputs = [m(input_ids=IDS) for m in (model, original)]
    assert not is_waiting(outputs[0])
    for output in outputs:
        (output.last_hidden_state.sin().sum() + output.pooler_output.sum()).backward()
    for a, b in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    model.requires_grad_(False)
    assert is_waiting(model(input_ids=IDS))
    with clipfast.exact_shortcuts(False):
        assert not is_waiting(model(input_ids=IDS))


def test_tuples_hold_tokens() -> None:
    model, original = pair()
    with torch.no_grad():
        for arguments in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": MASK}):
            outputs = [m(**arguments, return_dict=False) for m in (model, original)]
            assert all(type(o) is tuple for o in outputs)
            assert_close(tensors_of(outputs[0]), tensors_of(outputs[1]), 1e-12)


def holes() -> Tensor:
    mask = torch.ones_like(MASK)
    mask[2, 0] = 0
    return mask


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": holes()},
        {"attention_mask": MASK.flip(1)},
        {"attention_mask": MASK[:, None, None, :].bool()},
        {"position_ids": torch.arange(16)[None] // 2},
        {"output_attentions": True},
    ],
    ids=["holes", "left padding", "four dimensions", "position_ids", "output_attentions"],
)
def test_calls_that_fell_back_are_named(change: dict[str, Any]) -> None:
    model, original = pair(make=tiny.transformers_clip)
    assert clipfast.acceleration(model).fell_back == {}
    with torch.no_grad():
        for _ in range(2):
            outputs = [tensors_of(m.get_text_features(IDS, **change)) for m in (model, original)]
            assert_close(*outputs, 0)
    found = clipfast.acceleration(model)
    name = next(iter(change))
    ((path, reasons),) = found.fell_back.items()
    assert path == "text_model"
    assert [(name in reason, calls) for reason, calls in reasons.items()] == [(True, 2)]
    assert f"text_model: 2 × {next(iter(reasons))}" in str(found)
    assert clipfast.acceleration(copy.deepcopy(model)).fell_back == {}


def test_a_model_lives_as_long_as_tokens_wait() -> None:
    model, original = pair()
    alive = weakref.ref(model)
    with torch.no_grad():
        output = model(input_ids=IDS, attention_mask=MASK)
    del model
    assert torch.equal(output[0], original(input_ids=IDS, attention_mask=MASK)[0])
    gc.collect()
    assert alive() is None


def test_models_that_read_tokens_get_them() -> None:
    """What holds a tower inside transformers may read its tokens."""

    class Holder(transformers.PreTrainedModel):
        config_class, _supports_sdpa = transformers.CLIPTextConfig, True

        def __init__(self, tower: nn.Module) -> None:
            super().__init__(tower.config)
            self.tower = tower

    holder = clipfast.accelerate(Holder(tiny.transformers_text(False)).eval())
    with torch.no_grad():
        assert not is_waiting(holder.tower(input_ids=IDS))
