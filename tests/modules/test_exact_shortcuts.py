"""Packed captions and the one-token last block: the numbers of the dense towers, and when they stay away."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dense_towers import (
    BOUND,
    CONTEXT,
    EOS,
    assert_same_as_dense,
    image_tower,
    outputs_and_gradients,
    rows_seen,
    text_tower,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_exact_as_reference, relative_error
from torch import Tensor, nn

import clipfast


def captions_of(lengths: list[int]) -> Tensor:
    """Return token ids with the EOS at ``lengths[i] - 1`` and other ids, no zeros, behind it."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.randint(1, EOS - 1, (len(lengths), CONTEXT), generator=generator)
    tokens[torch.arange(len(lengths)), torch.tensor(lengths) - 1] = EOS
    return tokens


CAPTIONS = {
    "every length": list(range(2, CONTEXT + 1)),
    "all equal": [9] * 5,
    "all full": [CONTEXT] * 3,
    "EOS at position 1": [2, 2],
    "EOS first": [1, 5],
    "one": [12],
    "mixed": [5, 70, 5, 31, 77, 2, 31],
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lengths", CAPTIONS.values(), ids=CAPTIONS.keys())
def test_text_is_the_same_as_dense(lengths: list[int], checkpointing: bool) -> None:
    model = text_tower()
    model.set_grad_checkpointing(checkpointing)
    assert_same_as_dense(model, captions_of(lengths))


def test_the_first_of_several_eos_counts() -> None:
    tokens = captions_of([10, 20, 30])
    tokens[:, 40:50] = EOS
    tokens[1, 60] = EOS
    assert_same_as_dense(text_tower(), tokens)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(2, CONTEXT), min_size=1, max_size=9))
def test_text_is_the_same_as_dense_for_any_lengths(lengths: list[int]) -> None:
    assert_same_as_dense(text_tower(layers=2), captions_of(lengths))


@pytest.mark.parametrize(
    "changes", [{"output_dim": None}, {"approximate": "quick"}, {"pool_type": "argmax"}, {"layers": 1}]
)
def test_text_towers_of_other_kinds(changes: dict) -> None:
    assert_same_as_dense(text_tower(**changes), captions_of([5, 3, 9]))


def test_argmax_pooling_reads_rows_without_an_eos() -> None:
    model, tokens = text_tower(pool_type="argmax"), captions_of([5, 3, 9])
    tokens[1] = torch.arange(CONTEXT) % 50 + 1
    expected = model.forward_features(tokens)[[0, 1, 2], tokens.argmax(-1)] @ model.text_projection
    assert relative_error(model(tokens), expected) <= BOUND
    assert_same_as_dense(model, tokens)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("changes", [{}, {"patch_dropout": 0.5}, {"layers": 1}, {"output_dim": None}])
def test_images_are_the_same_as_dense(changes: dict, checkpointing: bool) -> None:
    model = image_tower(**changes)
    model.set_grad_checkpointing(checkpointing)
    assert_same_as_dense(model, torch.randn(3, 3, 32, 32, dtype=torch.float64))


def test_what_is_not_computed() -> None:
    text, image, tokens = text_tower(), image_tower(), captions_of([5, 70, 2])
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with rows_seen(text, image) as seen:
        text(tokens)
        assert seen == [77, 77, 3]  # 5 + 70 + 2 tokens, and one each
        image(images)
        assert seen[3:] == [4 * 17, 4 * 17, 4]
        seen.clear()
        with clipfast.exact_shortcuts(False):
            text(tokens), image(images)
        assert seen == [3 * 77] * 3 + [4 * 17] * 3


@pytest.mark.parametrize(("images", "rows"), [(1, 4), (3, 4), (4, 4), (11, 12), (12, 12), (13, 13)])
def test_few_rows_are_filled_up(images: int, rows: int) -> None:
    """MKL sums what is left over of few rows term by term."""
    model = image_tower().float()
    with rows_seen(model) as seen:
        model(torch.randn(images, 3, 32, 32))
        assert seen[-1] == rows
        model.double()(torch.randn(images, 3, 32, 32).double())
        assert seen[-1] == images


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [([5], (8, 4)), ([2, 1], (4, 4)), ([1], (4, 4)), ([5, 6], (12, 4)), ([9, 4], (13, 4)), ([3, 3, 5, 9], (20, 4))],
    ids=str,
)
def test_few_tokens_are_filled_up(lengths: list[int], rows: tuple[int, int]) -> None:
    model, tokens = text_tower(), captions_of(lengths)
    expected = outputs_and_gradients(model, tokens)
    with rows_seen(single := text_tower().float()) as seen:
        found = outputs_and_gradients(single, tokens)
    assert (seen[0], seen[-1]) == rows
    for name, value in expected.items():
        assert relative_error(found[name], value) <= 1e-5, name


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (lambda: image_tower(width=384, layers=1, heads=6), torch.randn(3, 3, 32, 32).double()),
        (lambda: image_tower(width=384, layers=1, heads=6), torch.randn(7, 3, 32, 32).double()),
        (lambda: text_tower(width=384, layers=2, heads=6), captions_of([3])),
    ],
    ids=["3 images", "7 images", "3 tokens"],
)
def test_gradients_of_few_rows_keep_their_digits(model: Callable[[], nn.Module], inputs: Tensor) -> None:
    """Against the dense tower in float32: fast error at most twice the reference's."""
    single = inputs.float() if inputs.is_floating_point() else inputs
    found = outputs_and_gradients(model().float(), single)
    exact = outputs_and_gradients(model(), inputs)
    with clipfast.exact_shortcuts(False):
        dense = outputs_and_gradients(model().float(), single)
    for name, value in exact.items():
        assert_as_exact_as_reference(found[name], dense[name], value, name)


ASKING_FOR_TOKENS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "features": lambda m, x: m.forward_features(x),
    "intermediates": lambda m, x: m.forward_intermediates(x),
}


@pytest.mark.parametrize("ask", ASKING_FOR_TOKENS.values(), ids=ASKING_FOR_TOKENS.keys())
def test_all_tokens_are_computed_when_they_are_asked_for(
    ask: Callable[[nn.Module, Tensor], object],
) -> None:
    model = image_tower()
    with rows_seen(model) as seen:
        ask(model, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert seen == [2 * 17] * 3


def hook_forward(model: nn.Module, seen: list) -> None:
    model.transformer.resblocks[-1].register_forward_hook(lambda m, args, out: seen.append(out.shape))


def hook_inside(model: nn.Module, seen: list) -> None:
    model.transformer.resblocks[-1].mlp.c_fc.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape))


@pytest.mark.parametrize("hook", [hook_forward, hook_inside])
def test_hooks_see_all_tokens(hook: Callable[[nn.Module, list], None]) -> None:
    for model, inputs, shape in (
        (text_tower(), captions_of([5, 3]), (2, CONTEXT, 32)),
        (image_tower(), torch.randn(2, 3, 32, 32, dtype=torch.float64), (2, 17, 32)),
    ):
        before, seen = model(inputs), []
        hook(model, seen)
        assert relative_error(model(inputs), before) <= BOUND
        assert seen == [shape]


def test_a_hook_on_an_early_block_sees_all_tokens() -> None:
    model, seen = text_tower(), []
    model.transformer.resblocks[0].register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert_same_as_dense(model, captions_of([5, 3]))
    assert seen == [(2, CONTEXT, 32)] * 2


def test_somebody_elses_block_gets_all_tokens() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert x.shape == (2, CONTEXT, 32)
            return 2 * x

    model, tokens = text_tower(), captions_of([5, 3])
    model.transformer.resblocks[2] = Doubling().double()
    expected = model.forward_features(tokens)[[0, 1], [4, 2]] @ model.text_projection
    assert relative_error(model(tokens), expected) <= BOUND


def test_compiled_text_takes_columns_in_buckets() -> None:
    # the last block and one that is not
    model = text_tower(layers=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for longest in (5, 7, 30, 12, 77, 6, 31, 70):
        tokens = captions_of([3, longest])
        actual = compiled(clipfast.trim_captions(tokens, eos_id=EOS))
        assert relative_error(actual, model(tokens)) <= BOUND
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # 8, 16, 32 and 77 columns


def test_compiled_gradients() -> None:
    for model, inputs in (
        (text_tower(layers=2), captions_of([5, 3, 30])),
        (image_tower(layers=2), torch.randn(2, 3, 32, 32, dtype=torch.float64)),
    ):
        expected = outputs_and_gradients(model, inputs)
        model.compile(fullgraph=True, backend="aot_eager")
        for name, actual in outputs_and_gradients(model, inputs).items():
            assert relative_error(actual, expected[name]) <= BOUND, name


@pytest.mark.parametrize(
    ("longest", "columns"), [(1, 8), (8, 8), (9, 16), (24, 24), (33, 48), (64, 64), (65, 77), (77, 77)]
)
def test_buckets(longest: int, columns: int) -> None:
    tokens = captions_of([1, longest])
    trimmed = clipfast.trim_captions(tokens, eos_id=EOS)
    assert torch.equal(trimmed, tokens[:, :columns])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 5, dtype=torch.long), "got a row without the EOS id 199"),
        (torch.tensor([5, EOS]), r"got shape \(2,\), expected \[B, L\]"),
        (torch.zeros(0, 5, dtype=torch.long), r"got shape \(0, 5\)"),
    ],
)
def test_captions_that_cannot_be_cut(tokens: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clipfast.trim_captions(tokens, eos_id=EOS)


def test_no_captions() -> None:
    assert text_tower()(torch.zeros(0, CONTEXT, dtype=torch.long)).shape == (0, 24)


def test_wrong_pooling() -> None:
    with pytest.raises(
        ValueError, match=r"pool_type\): got 'middle', expected one of 'eos', 'argmax', 'last', 'first'"
    ):
        text_tower(pool_type="middle")
