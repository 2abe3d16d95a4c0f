"""clipfast.accelerate on transformers' SigLIP, SigLIP 2 and MetaCLIP 2."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import tiny_towers as tiny
import torch
from acceleration import (
    Case,
    assert_close,
    comparable,
    counted,
    loss_of,
    tensors_of,
)
from acceleration_checks import (
    COMMON,
    check_changed,
    check_checkpointed_gradients,
    check_compiled,
    check_ddp,
    check_float32_outputs,
    check_freed,
    check_hooked,
    check_loaded_by_assignment,
    check_outputs_and_gradients,
    check_packed_inference,
    parametrize,
)

import clipfast

pytestmark = pytest.mark.filterwarnings("ignore")

POOLED = {"token_outputs": False}
SIGLIP = Case("SigLIP", tiny.siglip, tiny.pair, towers=2)
SIGLIP_2 = Case("SigLIP 2", tiny.siglip2, tiny.patches_and_ids, towers=2)


def eos_at_2(dtype: torch.dtype) -> dict[str, Any]:
    """Captions in which the EOS id is 2, as MetaCLIP 2's is, and the largest id comes before it."""
    tokens = tiny.ids(dtype)["input_ids"].clone()
    tokens[tokens == 2] = 3
    tokens[:, 0] = 98
    return {"input_ids": tokens.masked_fill(tokens == 99, 2)}


def larger(dtype: torch.dtype) -> dict[str, Any]:
    return tiny.images(dtype, 48) | {"interpolate_pos_encoding": True}


def as_tuple(inputs: Callable[[torch.dtype], dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    return inputs(dtype) | {"return_dict": False}


def same_grids(dtype: torch.dtype) -> dict[str, Any]:
    """Pictures of one length, and of one grid: nothing is padded."""
    return tiny.patches(dtype, [(4, 4), (2, 8), (4, 4)])


def again(dtype: torch.dtype) -> dict[str, Any]:
    """Grids that come twice, in no order."""
    return tiny.patches(dtype, [(3, 5), (4, 4), (3, 5), (2, 3), (4, 4)], most=20)


METACLIP_2 = Case("MetaCLIP 2", tiny.metaclip_2, lambda d: tiny.images(d) | eos_at_2(d) | {"return_loss": True}, 2)
NAFLEX = Case("NaFlex tower", tiny.siglip2_vision, tiny.patches)


def metaclip_2(kind: str, inputs: Callable[[torch.dtype], dict[str, Any]], **options: Any) -> Case:
    return Case(f"{kind} {options}", partial(tiny.metaclip_2_tower, kind), inputs, options=options)


CASES = [
    METACLIP_2,
    metaclip_2("MetaClip2TextModelWithProjection", eos_at_2),
    metaclip_2("MetaClip2VisionModelWithProjection", tiny.images, **POOLED),
    metaclip_2("MetaClip2ForImageClassification", tiny.images, **POOLED),
    Case("SigLIP pooled", tiny.siglip, tiny.pair, 2, POOLED),
    Case("SigLIP text", tiny.siglip_text, tiny.ids),
    Case("SigLIP images", tiny.siglip_vision, partial(as_tuple, tiny.images)),
    Case("head_dim 72", partial(tiny.siglip_vision, hidden_size=144), tiny.images),
    Case("larger images", tiny.siglip_vision, larger),
    Case("no head", partial(tiny.siglip_vision, vision_use_head=False), tiny.images),
    Case("classifier", tiny.siglip_classifier, tiny.images),
    Case("SigLIP 2 pooled", tiny.siglip2, tiny.patches_and_ids, 2, POOLED),
    Case("NaFlex tuple", tiny.siglip2_vision, partial(as_tuple, tiny.patches)),
    Case("NaFlex pooled", tiny.siglip2_vision, again, options=POOLED),
    Case("NaFlex no head", partial(tiny.siglip2_vision, vision_use_head=False), again),
    Case("NaFlex one length", tiny.siglip2_vision, same_grids),
    Case("NaFlex one length, no mask", tiny.siglip2_vision, lambda d: same_grids(d) | {"pixel_attention_mask": None}),
    Case("NaFlex twice", tiny.siglip2_vision, again),
    Case("NaFlex classifier", tiny.siglip2_classifier, tiny.patches),
]


@parametrize([SIGLIP, SIGLIP_2], COMMON)
def test_accelerated(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize(CASES, (check_outputs_and_gradients, check_float32_outputs))
def test_accelerated_kinds(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize(
    [SIGLIP, SIGLIP_2],
    (
        check_loaded_by_assignment,
        check_ddp,
        check_hooked,
        check_changed,
        check_freed,
        check_packed_inference,
        check_checkpointed_gradients,
    ),
)
def test_accelerated_rarely(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([SIGLIP], (check_compiled,))
def test_compiled(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def changed(case: Case, change: Callable[[dict[str, Any]], None]) -> Case:
    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        arguments = case.inputs(dtype)
        change(arguments)
        return arguments

    return Case("", case.make, inputs, case.towers, case.options)


def left_padded(arguments: dict[str, Any]) -> None:
    arguments["attention_mask"] = torch.ones(3, 16)
    arguments["attention_mask"][:, 0] = 0


def right_padded(arguments: dict[str, Any]) -> None:
    arguments["attention_mask"] = torch.ones(3, 16, dtype=torch.long)
    arguments["attention_mask"][1, 9:] = 0


@pytest.mark.parametrize("options", [{}, POOLED], ids=["tokens", "pooled"])
@pytest.mark.parametrize(
    "change", [left_padded, right_padded, lambda a: a.update(position_ids=torch.arange(16)[None] // 2)]
)
def test_text_that_the_original_serves(change: Callable[[dict[str, Any]], None], options: dict[str, Any]) -> None:
    case = changed(Case("", tiny.siglip_text, tiny.ids, options=options), change)
    model, original = case.pair()
    with counted() as calls, torch.no_grad():
        assert_close(case.call(model), case.call(original), 0)
    assert not calls
    assert sum(clipfast.acceleration(model).fell_back[""].values()) == 1


def test_a_mask_that_hides_nothing_is_served() -> None:
    case = changed(Case("", tiny.siglip_text, tiny.ids), lambda a: a.update(attention_mask=torch.ones(3, 16)))
    model, original = case.pair()
    with counted() as calls:
        assert_close(case.call(model), case.call(original), 1e-12)
    assert len(calls) == 1


def test_texts_are_read_without_computing_tokens() -> None:
    case = Case("", tiny.siglip_text, tiny.ids)
    model, original = case.pair()
    with torch.no_grad(), counted() as calls:
        actual, expected = (m(**tiny.ids(torch.float64)) for m in (model, original))
        assert_close([actual.pooler_output], [expected.pooler_output], 1e-12)
        assert len(calls) == 1
        assert_close([actual.last_hidden_state], [expected.last_hidden_state], 1e-12)
        assert len(calls) == 2
        # who reads tokens gets the next call's at once
        assert_close(case.call(model), case.call(original), 1e-12)
        assert len(calls) == 3


def other_mask(arguments: dict[str, Any]) -> None:
    arguments["pixel_attention_mask"][1, 0] = 0


def no_mask(arguments: dict[str, Any]) -> None:
    arguments["pixel_attention_mask"] = None


def noise_as_padding(arguments: dict[str, Any]) -> None:
    arguments["pixel_values"][3, 9] = 1.0


NAFLEX_CHANGES = {
    other_mask: "a pixel_attention_mask other than that of spatial_shapes",
    no_mask: "a pixel_attention_mask other than that of spatial_shapes",
    noise_as_padding: "pixel_values whose padding is not alike",
}


@pytest.mark.parametrize("change", NAFLEX_CHANGES)
def test_patches_that_the_original_serves(change: Callable[[dict[str, Any]], None]) -> None:
    case = changed(NAFLEX, change)
    model, original = case.pair()
    with counted() as calls:
        # a mask that hides nothing leaves the pooling to clipfast
        assert_close(case.call(model), case.call(original), 1e-12)
    assert not calls
    assert clipfast.acceleration(model).fell_back[""] == {NAFLEX_CHANGES[change]: 1}


def test_padding_does_not_matter_where_nobody_is_given_it() -> None:
    case = changed(Case("", tiny.siglip2_vision, tiny.patches, options=POOLED), noise_as_padding)
    model, original = case.pair()
    with counted() as calls:
        assert_close(case.call(model), comparable(case, case.call(original)), 1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, POOLED], ids=["tokens", "pooled"])
def test_gradients_of_pixels_and_padding(options: dict[str, Any]) -> None:
    case = Case("", tiny.siglip2_vision, tiny.patches, options=options)
    gradients = []
    for m in case.pair():
        inputs = case.inputs(torch.float64)
        inputs["pixel_values"].requires_grad_()
        output = m(**inputs)
        tokens = [] if options else [output.last_hidden_state]
        loss_of([output.pooler_output, *tokens]).backward()
        gradients.append(inputs["pixel_values"].grad)
    assert_close(gradients[:1], gradients[1:], 1e-12)


def test_shortcuts_that_are_forbidden_pad() -> None:
    model, original = NAFLEX.pair()
    with clipfast.exact_shortcuts(False), counted() as calls:
        assert_close(NAFLEX.call(model), NAFLEX.call(original), 1e-12)
    assert not calls


def test_wrong_patches_fail_as_in_the_original() -> None:
    for change in (
        {"spatial_shapes": torch.tensor([[5, 5]] * 5)},
        {"spatial_shapes": torch.zeros(5, 2).long()},
        {"pixel_values": torch.zeros(5, 16, 27, dtype=torch.float64)},
    ):
        errors = []
        for m in NAFLEX.pair():
            with pytest.raises((RuntimeError, ValueError, AssertionError)) as error:
                m(**tiny.patches(torch.float64) | change)
            errors.append(str(error.value))
        assert errors[0] == errors[1]


def test_packed_tokens_wait_until_they_are_read() -> None:
    model, original = NAFLEX.pair(torch.float32)
    with torch.no_grad():
        if model.serving_twin().transformer.packed_encoder(torch.zeros(1, 64)) is None:
            pytest.skip("there are no packed weights here")
    arguments = tiny.patches(torch.float32)
    with torch.no_grad(), counted() as calls:
        expected = original(**arguments)
        actual = model(**arguments)
        assert len(calls) == 1
        assert_close([actual.pooler_output], [expected.pooler_output], 2e-6)
        arguments["pixel_values"].zero_()
        assert_close([actual.last_hidden_state], [expected.last_hidden_state], 2e-6)
        assert len(calls) == 2
        # who reads tokens gets the next call's at once
        assert_close(NAFLEX.call(model, torch.float32), tensors_of(expected), 2e-6)
        assert len(calls) == 3


@pytest.mark.exhaustive
def test_patches_are_computed_by_the_original_under_a_compiler() -> None:
    model, original = NAFLEX.pair()
    torch._dynamo.reset()
    with counted() as calls:
        outputs = NAFLEX.call(torch.compile(model, backend="eager"))
    assert not calls
    assert_close(outputs, NAFLEX.call(original), 1e-12)


def test_warm_up_makes_patches_up() -> None:
    for make in (tiny.siglip2, tiny.siglip2_vision):
        model = clipfast.accelerate(make())
        with counted() as calls:
            clipfast.warm_up(model)
        assert len(calls) == len(clipfast.acceleration(model).accelerated) - 1  # the pooling is no stack of blocks
    with counted() as calls:
        clipfast.warm_up(model, images=tiny.patches(torch.float32))
    assert len(calls) == 1
