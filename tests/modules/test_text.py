"""The text tower's options and errors; what it computes is compared with open_clip and transformers in tests/models."""

from __future__ import annotations

import pytest
import torch
from oracle import relative_error
from rivals import captions

import clipfast

VOCABULARY, CONTEXT = 200, 16
EOS = VOCABULARY - 1


def small_text(**changes: object) -> clipfast.TextTransformer:
    torch.manual_seed(0)
    sizes = {"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 48, "layers": 3, "heads": 3}
    return clipfast.TextTransformer(**(sizes | {"output_dim": 24} | changes)).double()


def test_features_are_read_at_the_first_eos() -> None:
    model, tokens = small_text(), captions(4, CONTEXT, VOCABULARY)
    tokens[0] = torch.tensor([198, 7, EOS, 5, EOS] + [0] * 11)
    ends = [row.tolist().index(EOS) for row in tokens]
    expected = model.forward_features(tokens)[torch.arange(4), ends] @ model.text_projection
    assert relative_error(model(tokens), expected) < 1e-13


def test_what_follows_the_eos_changes_nothing() -> None:
    model, tokens = small_text(), captions(4, CONTEXT, VOCABULARY)
    changed = tokens.clone()
    changed[tokens == 0] = 3
    assert not torch.equal(changed, tokens)
    assert torch.equal(model(changed), model(tokens))


def test_shorter_captions_need_no_padding() -> None:
    model = small_text()
    tokens = torch.tensor([[198, 5, 6, EOS]])
    padded = torch.cat([tokens, torch.zeros(1, CONTEXT - 4, dtype=torch.long)], dim=1)
    assert relative_error(model(tokens), model(padded)) < 1e-13


def test_another_eos_id() -> None:
    model = small_text(eos_id=2)
    tokens = torch.tensor([[1, 5, 2, 9, EOS] + [0] * 11])
    expected = model.forward_features(tokens)[:, 2] @ model.text_projection
    assert relative_error(model(tokens), expected) < 1e-13


def test_attention_maps_are_causal() -> None:
    maps = small_text().get_attention_maps(captions(2, CONTEXT, VOCABULARY))
    assert maps.shape == (3, 2, 3, CONTEXT, CONTEXT)
    assert maps.triu(1).count_nonzero() == 0
    assert relative_error(maps.sum(-1), torch.ones(3, 2, 3, CONTEXT, dtype=torch.float64)) < 1e-13


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens = captions(4, CONTEXT, VOCABULARY)
    gradients = []
    for enable in (False, True):
        model = small_text()
        model.set_grad_checkpointing(enable)
        model(tokens).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.full((2, 4), 1.0), TypeError, r"got torch.float32, expected token ids \[B, L\]"),
        (torch.tensor([198, 5, EOS]), ValueError, r"got shape \(3,\)"),
        (torch.full((1, CONTEXT + 1), EOS), ValueError, r"got shape \(1, 17\).*1 ≤ L ≤ 16"),
        (torch.tensor([[198, 200, EOS]]), ValueError, "got ids 198 to 200, expected 0 to 199"),
        (torch.tensor([[198, -1, EOS]]), ValueError, "got ids -1 to 199"),
        (
            torch.tensor([[198, 5, EOS], [198, 5, 6]]),
            ValueError,
            r"1 rows without the EOS id 199 \(the first is row 1\)",
        ),
        ("a cat", TypeError, "got str.*clipfast.tokenize"),
    ],
)
def test_wrong_tokens(wrong: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_text()(wrong)


def test_wrong_eos_id() -> None:
    with pytest.raises(ValueError, match=r"eos_id.*200.*vocab_size = 200"):
        small_text(eos_id=200)


def test_int32_tokens_and_an_empty_batch() -> None:
    model, tokens = small_text(), captions(3, CONTEXT, VOCABULARY)
    assert torch.equal(model(tokens.int()), model(tokens))
    assert model(tokens[:0]).shape == (0, 24)


def test_compiles_into_one_graph() -> None:
    model, tokens = small_text(), captions(3, CONTEXT, VOCABULARY)
    features = torch.compile(model, fullgraph=True, backend="aot_eager")(tokens)
    assert relative_error(features, model(tokens)) < 1e-12
    features.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
