"""clipfast.accelerate where hidden states of layers are asked for, as LLaVA and diffusion models do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import peft
import pytest
import tiny
import tiny_towers
import torch
import transformers
from acceleration import Case, assert_close, assert_same_gradients, counted, loss_of, tensors_of
from rivals import captions
from torch import Tensor, nn

import clipfast
from clipfast.models.twin_blocks import TwinBlock

TOWERS = {
    "CLIP images": Case("", partial(tiny.transformers_vision, False), tiny_towers.images),
    "CLIP text": Case("", partial(tiny.transformers_text, False), tiny_towers.ids),
    "SigLIP images": Case("", tiny_towers.siglip_vision, tiny_towers.images),
    "SigLIP text": Case("", tiny_towers.siglip_text, tiny_towers.ids),
    "SigLIP 2 images": Case("", tiny_towers.siglip2_vision, tiny_towers.patches),
}


@contextmanager
def blocks_counted() -> Iterator[list[nn.Module]]:
    """Collect the blocks of twins that are run."""
    calls: list[nn.Module] = []
    carry = TwinBlock.carry

    def count(self: TwinBlock, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return carry(self, *args, **kwargs)

    with mock.patch.object(TwinBlock, "carry", count):
        yield calls


def asking(case: Case, **more: Any) -> Case:
    return Case("", case.make, lambda dtype: case.inputs(dtype) | more, options=case.options)


def output_of(case: Case, model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    return model(**case.inputs(dtype))


@pytest.mark.parametrize("wanted", [True, -2, 1, [0, -1], [-2, 50]], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_hidden_states(tower: str, wanted: Any) -> None:
    case = asking(TOWERS[tower], output_hidden_states=wanted)
    model, original = case.pair()
    with blocks_counted() as blocks:
        actual = output_of(case, model)
    # with gradients nothing waits
    assert len(blocks) == model.config.num_hidden_layers
    expected = output_of(case, original)
    assert list(actual) == list(expected)
    assert type(actual.hidden_states) is tuple
    assert [h is None for h in actual.hidden_states] == [h is None for h in expected.hidden_states]
    assert_close(tensors_of(actual), tensors_of(expected), 1e-12)
    loss_of(tensors_of(actual)).backward()
    loss_of(tensors_of(expected)).backward()
    assert_same_gradients(model, original)
    assert not clipfast.acceleration(model).fell_back
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        model, original = case.pair(dtype)
        with torch.no_grad():
            actual, expected = (output_of(case, m, dtype) for m in (model, original))
            assert_close(tensors_of(actual), tensors_of(expected), bound)
            assert type(actual) is type(expected)


@pytest.mark.parametrize("tower", TOWERS)
def test_layers_are_counted_as_the_configuration_counts_them(tower: str) -> None:
    case = asking(TOWERS[tower], output_hidden_states=-2)
    model, original = case.pair()
    for m in (model, original):
        # who cuts layers off may leave the configuration as it was
        del m.encoder.layers[-1]
    with torch.no_grad():
        actual, expected = (output_of(case, m) for m in (model, original))
    assert [h is None for h in actual.hidden_states] == [h is None for h in expected.hidden_states]
    assert_close(tensors_of(actual), tensors_of(expected), 1e-12)


@pytest.mark.parametrize("fields", [("pooler_output", "last_hidden_state"), ("last_hidden_state", "pooler_output")])
@pytest.mark.parametrize("tower", TOWERS)
def test_what_lies_behind_a_layer_waits(tower: str, fields: tuple[str, str]) -> None:
    case = asking(TOWERS[tower], output_hidden_states=-2)
    model, original = case.pair()
    layers = model.config.num_hidden_layers
    with torch.no_grad(), blocks_counted() as blocks:
        actual, expected = (output_of(case, m) for m in (model, original))
        seen = actual.hidden_states[-2]
        assert len(blocks) == layers - 1
        assert_close([seen], [expected.hidden_states[-2]], 1e-12)
        # whoever was given it may write to it
        seen.zero_()
        for field in fields:
            assert_close([actual[field]], [expected[field]], 1e-12)
            assert len(blocks) == layers
            actual[field].zero_()
        actual = output_of(case, model)
        next(model.parameters()).mul_(1.5)
        with pytest.raises(RuntimeError, match="pooler_output is computed when it is first read"):
            actual.pooler_output.sum()


@pytest.mark.parametrize("options", [{"return_dict": False}, {"token_outputs": False}], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_hidden_states_in_other_forms(tower: str, options: dict[str, Any]) -> None:
    case = TOWERS[tower]
    if "token_outputs" in options:
        case = Case("", case.make, case.inputs, options=options)
        options = {}
    case = asking(case, output_hidden_states=[-1, -2], **options)
    model, original = case.pair()
    with torch.no_grad():
        actual, expected = (output_of(case, m) for m in (model, original))
    if case.options:
        assert actual.last_hidden_state is None
        expected = [expected.pooler_output, expected.hidden_states]
    assert_close(tensors_of(actual), tensors_of(expected), 1e-12)


def test_a_head_that_is_hooked_is_called_at_once() -> None:
    case = asking(TOWERS["SigLIP images"], output_hidden_states=-2)
    model, _ = case.pair()
    seen = []
    model.head.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        output_of(case, model)
    assert len(seen) == 1


@pytest.mark.parametrize("tower", ["SigLIP images", "SigLIP 2 images"])
def test_an_adapted_head_is_called_at_once(tower: str) -> None:
    case = asking(TOWERS[tower], output_hidden_states=-2)
    model, original = case.pair()
    for m in (model, original):
        torch.manual_seed(0)
        # it writes to the head's weights in every call
        peft.get_peft_model(m, peft.LoraConfig(target_modules=["attention"], r=2, init_lora_weights=False))
        m.double()
    with torch.no_grad():
        actual, expected = (output_of(case, m) for m in (model, original))
    assert_close(tensors_of(actual), tensors_of(expected), 1e-12)


@pytest.mark.parametrize("value", [{"output_attentions": True}, {"output_hidden_states": "all"}], ids=str)
def test_the_original_says_what_it_says(value: dict[str, Any]) -> None:
    def make() -> nn.Module:
        model = tiny_towers.siglip_vision()
        model.set_attn_implementation("eager")
        return model

    case = asking(Case("", make, tiny_towers.images), **value)
    model, original = case.pair()
    results = []
    for m in (original, model):
        try:
            results.append(case.call(m))
        except TypeError as error:
            results.append([str(error)])
    if isinstance(results[0][0], Tensor):
        # SigLIP's pooling is served by itself
        assert_close(*results, 1e-12)
    else:
        assert results[0] == results[1]
    assert next(iter(value)) in str(clipfast.acceleration(model))


def prompt(dtype: torch.dtype, images: int, tokens: int, size: int = 32) -> dict[str, Any]:
    """A sentence in which each image has its tokens, and the images."""
    generator = torch.Generator().manual_seed(3)
    ids = captions(images, tokens + 6, 90).clamp(10)
    ids[:, 2 : 2 + tokens] = 7
    pixel_values = torch.randn(images, 3, size, size, generator=generator).to(dtype)
    return {"input_ids": ids, "pixel_values": pixel_values}


CLIP_VISION = transformers.CLIPVisionConfig(**tiny_towers.IMAGES)
SIGLIP_VISION = transformers.SiglipVisionConfig(**tiny_towers.IMAGES)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("make", "tokens", "run"),
    [
        (partial(tiny_towers.llava, CLIP_VISION, -2, "default"), 16, 1),
        (partial(tiny_towers.llava, CLIP_VISION, [-2, 0], "full"), 17, 1),
        (partial(tiny_towers.llava, SIGLIP_VISION, -1), 16, 2),
        (partial(tiny_towers.llava, SIGLIP_VISION, -2), 16, 1),
    ],
)
def test_llava(make: Callable[[], nn.Module], tokens: int, run: int, train: bool) -> None:
    case = Case("", make, lambda dtype: prompt(dtype, 2, tokens))
    model, original = case.pair()
    for m in (model, original):
        # as it is fine-tuned
        m.model.vision_tower.requires_grad_(False)
        m.train(train)
    with torch.set_grad_enabled(train):
        with blocks_counted() as blocks:
            actual = case.call(model)
        assert len(blocks) == run
        expected = case.call(original)
        assert_close(actual, expected, 1e-12)
    assert not clipfast.acceleration(model).fell_back
    if train:
        loss_of(actual).backward()
        loss_of(expected).backward()
        assert_same_gradients(model.model.multi_modal_projector, original.model.multi_modal_projector)


def test_a_whole_model_that_gives_hidden_states() -> None:
    case = Case("", tiny_towers.siglip, lambda dtype: tiny_towers.pair(dtype) | {"output_hidden_states": True})
    model, original = case.pair()
    with torch.no_grad():
        actual, expected = case.call(model), case.call(original)
    assert_close(actual, expected, 1e-12)
    assert len(actual) == 9 + 2 * 3


def test_paligemma() -> None:
    case = Case("", tiny_towers.paligemma, lambda dtype: prompt(dtype, 2, 16))
    model, original = case.pair()
    with torch.no_grad(), counted() as calls:
        assert_close(case.call(model), case.call(original), 1e-12)
    assert len(calls) == 1
