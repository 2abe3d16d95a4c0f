"""clipfast.accelerate on transformers' CLIP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from acceleration import Case, assert_close, counted, tensors_of
from acceleration_checks import COMMON, RARE, check_checkpointed_gradients, check_compiled, parametrize
from rivals import captions
from torch import Tensor, nn

import clipfast

VISION = transformers.CLIPVisionConfig(
    hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
)


def pixels(dtype: torch.dtype) -> dict[str, Any]:
    return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3)).to(dtype)}


def ids(dtype: torch.dtype) -> dict[str, Any]:
    return {"input_ids": captions(3, 16, 100)}


def both(dtype: torch.dtype) -> dict[str, Any]:
    return pixels(dtype) | ids(dtype) | {"return_loss": True}


def as_tuple(dtype: torch.dtype) -> dict[str, Any]:
    return pixels(dtype) | ids(dtype) | {"return_dict": False}


def padded(dtype: torch.dtype) -> dict[str, Any]:
    """Captions with the mask that the tokenizer gives: nothing behind the first EOS."""
    tokens = captions(3, 16, 100)
    ends = (tokens == 99).int().argmax(dim=-1)
    return {"input_ids": tokens, "attention_mask": (torch.arange(16) <= ends[:, None]).long()}


def larger(dtype: torch.dtype) -> dict[str, Any]:
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    return {"pixel_values": images, "interpolate_pos_encoding": True}


def legacy_text() -> nn.Module:
    """Return a text model of the configurations before 2023: its EOS id is wrong, and it is read at the largest id."""
    model = tiny.transformers_text(True)
    model.config.eos_token_id = model.text_model.eos_token_id = 2
    return model


def classifier() -> nn.Module:
    config = transformers.CLIPConfig(vision_config=VISION.to_dict(), num_labels=5)
    return tiny.drawn(transformers.CLIPForImageClassification(config))


POOLED = {"token_outputs": False}
CLIP = Case("CLIP", tiny.transformers_clip, both, towers=2)
TEXT = Case("text", partial(tiny.transformers_text, False), ids)
CASES = [
    CLIP,
    Case("quickgelu", partial(tiny.transformers_clip, "quick_gelu"), both, towers=2),
    Case("tanh gelu", partial(tiny.transformers_clip, "gelu_new"), as_tuple, towers=2),
    Case("CLIP pooled", tiny.transformers_clip, both, towers=2, options=POOLED),
    Case("vision", partial(tiny.transformers_vision, False), pixels),
    Case("vision pooled", partial(tiny.transformers_vision, False), pixels, options=POOLED),
    Case("vision projected", partial(tiny.transformers_vision, True), pixels),
    Case("larger images", partial(tiny.transformers_vision, True), larger),
    TEXT,
    Case("text projected", partial(tiny.transformers_text, True), ids),
    Case("text projected pooled", partial(tiny.transformers_text, True), ids, options=POOLED),
    Case("old configuration", legacy_text, ids, options=POOLED),
]


@parametrize(CASES, COMMON)
def test_accelerated(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([CLIP], (*RARE, check_checkpointed_gradients))
def test_accelerated_clip(check: Callable[[Case], None], case: Case) -> None:
    check(case)


@parametrize([TEXT, next(c for c in CASES if c.name == "CLIP pooled")], (check_compiled,))
def test_compiled(check: Callable[[Case], None], case: Case) -> None:
    check(case)


def test_features() -> None:
    model, original = CLIP.pair()
    for name, inputs in {"get_image_features": pixels, "get_text_features": ids}.items():
        arguments = inputs(torch.float64)
        with counted() as calls:
            actual = tensors_of(getattr(model, name)(**arguments))
        assert len(calls) == 1
        assert_close(actual, tensors_of(getattr(original, name)(**arguments)), 1e-12)


def test_a_classifier_keeps_the_tokens_that_it_reads() -> None:
    case = Case("", classifier, pixels, options=POOLED)
    model, original = case.pair()
    with counted() as calls:
        assert_close(case.call(model), case.call(original), 1e-12)
    assert len(calls) == 1


def test_accelerating_again_changes_the_options() -> None:
    case = Case("", tiny.transformers_clip, both)
    model, _ = case.pair()
    whole = len(case.call(model))
    assert len(case.call(clipfast.accelerate(model, token_outputs=False))) == whole - 2
    assert len(case.call(clipfast.accelerate(model))) == whole


def test_a_wrapped_tower_may_leave_its_tokens_out() -> None:
    wrapped = clipfast.accelerate(nn.Sequential(tiny.transformers_vision(False)), token_outputs=False)
    assert wrapped(torch.randn(2, 3, 32, 32)).last_hidden_state is None


def test_masks_of_padding() -> None:
    """With tokens in the output a mask shows in those of padding; without, nothing before the EOS is hidden."""
    for options, served in (({}, 0), (POOLED, 1)):
        case = Case("", partial(tiny.transformers_text, True), padded, options=options)
        model, original = case.pair()
        with counted() as calls:
            outputs = case.call(model)
        assert len(calls) == served
        expected = case.call(original)
        assert_close(outputs, [t for t in expected if options == {} or t.dim() < 3], 1e-12)


def test_masks_of_nothing_are_served() -> None:
    case = Case("", TEXT.make, lambda dtype: ids(dtype) | {"attention_mask": torch.ones(3, 16)})
    model, original = case.pair()
    with counted() as calls:
        assert_close(case.call(model), case.call(original), 1e-12)
    assert len(calls) == 1


def _left_padded() -> Tensor:
    mask = torch.ones(3, 16)
    mask[:, 0] = 0
    return mask


@pytest.mark.parametrize(
    "change",
    [
        {"output_attentions": True},
        {"position_ids": torch.arange(16)[None] // 2},
        {"attention_mask": _left_padded()},
    ],
    ids=lambda change: next(iter(change)),
)
@pytest.mark.parametrize("options", [{}, POOLED], ids=["tokens", "pooled"])
def test_the_original_serves(change: dict[str, Any], options: dict[str, Any]) -> None:
    def make() -> nn.Module:
        model = TEXT.make()
        model.set_attn_implementation("eager" if "output_attentions" in change else "sdpa")
        return model

    case = Case("", make, lambda dtype: ids(dtype) | change, options=options)
    model, original = case.pair()
    with counted() as calls:
        assert_close(case.call(model), case.call(original), 0)
    assert not calls
    # transformers leaves hooks behind
    plain = Case("", make, ids)
    with counted() as calls:
        plain.call(model)
    assert len(calls) == 1


def test_hidden_states_set_in_the_configuration() -> None:
    model, original = TEXT.pair()
    for m in (model, original):
        m.config.output_hidden_states = True
    outputs = TEXT.call(model)
    assert len(outputs) == 6
    assert_close(outputs, TEXT.call(original), 1e-12)
    assert not clipfast.acceleration(model).fell_back


def test_attention_dropout_in_training_runs_the_original() -> None:
    def make() -> nn.Module:
        return tiny.drawn(transformers.CLIPVisionModel(VISION))

    VISION.attention_dropout = 0.5
    try:
        model, original = Case("", make, pixels).pair()
    finally:
        VISION.attention_dropout = 0.0
    case = Case("", make, pixels)
    with counted() as calls:
        assert_close(case.call(model.train()), case.call(original.train()), 0)
        assert not calls
        assert_close(case.call(model.eval()), case.call(original.eval()), 1e-12)
    assert len(calls) == 1


def test_saved_as_pretrained(tmp_path: Path) -> None:
    model, original = CLIP.pair(torch.float32)
    model.save_pretrained(tmp_path / "accelerated")
    original.save_pretrained(tmp_path / "original")
    files = sorted(p.name for p in (tmp_path / "original").iterdir())
    assert sorted(p.name for p in (tmp_path / "accelerated").iterdir()) == files
    for name in files:
        assert (tmp_path / "accelerated" / name).read_bytes() == (tmp_path / "original" / name).read_bytes(), name
    loaded = transformers.CLIPModel.from_pretrained(tmp_path / "accelerated")
    assert type(loaded) is transformers.CLIPModel


@pytest.mark.parametrize(
    ("activation", "reason"),
    [
        (nn.ReLU, "text_model: layer 1's activation is a ReLU, expected a GELU"),
        (partial(nn.GELU, approximate="tanh"), "text_model: its blocks differ in heads, GELU or epsilon"),
    ],
)
def test_only_a_tower_that_fits_is_accelerated(activation: Callable[[], nn.Module], reason: str) -> None:
    model = tiny.transformers_clip()
    model.text_model.encoder.layers[1].mlp.activation_fn = activation()
    with pytest.warns(clipfast.models.accelerate.AccelerateWarning, match=reason):
        clipfast.accelerate(model)
    assert clipfast.acceleration(model).accelerated == ("vision_model",)
    assert "text_model" in str(clipfast.acceleration(model))


def test_a_text_model_of_another_kind_is_refused() -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    with pytest.raises(ValueError, match=r"BertModel with nothing in it that can be accelerated"):
        clipfast.accelerate(transformers.BertModel(config))
