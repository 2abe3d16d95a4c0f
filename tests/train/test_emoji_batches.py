from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import clipfast
from clipfast.data.emoji_pairs import EmojiPairs
from clipfast.train.emoji_batches import encode_all, normalized_pixels, training_batches, whole_tokens


def numbered_pairs(count: int) -> tuple[EmojiPairs, torch.Tensor]:
    """Pairs whose pictures and tokens both hold their number."""
    numbers = np.arange(count, dtype=np.uint8)
    pictures = np.broadcast_to(numbers[:, None, None, None], (count, 8, 8, 3)).copy()
    pairs = EmojiPairs(pictures, [str(n) for n in numbers], [""] * count, numbers % 5 == 0)
    return pairs, torch.arange(count)[:, None]


def test_batches_hold_pairs_of_training_only_and_all_of_them():
    pairs, tokens = numbered_pairs(40)
    batches = list(itertools.islice(training_batches(pairs, tokens, 8, seed=0), 8))
    for images, texts in batches:
        assert images.shape == (8, 3, 8, 8)
        expected = normalized_pixels(pairs.pictures[texts[:, 0].numpy()])
        assert torch.equal(images, expected)
    first, second = (torch.cat([texts[:, 0] for _, texts in batches[i : i + 4]]).tolist() for i in (0, 4))
    assert sorted(first) == sorted(second) == pairs.train_indices.tolist()
    assert first != second


def test_the_order_follows_the_seed():
    pairs, tokens = numbered_pairs(40)
    order = [next(training_batches(pairs, tokens, 32, seed))[1].flatten().tolist() for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]


def test_pixels_are_normalised_as_clip_s_are():
    pictures = np.zeros((1, 2, 2, 3), np.uint8)
    pictures[0, 0, 1] = [255, 128, 0]
    pixels = normalized_pixels(pictures)
    expected = (torch.tensor([1.0, 128 / 255, 0.0]) - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    torch.testing.assert_close(pixels[0, :, 0, 1], expected)


def test_no_caption_is_cut_short():
    captions = ["tiger", "couple with heart woman man medium-light skin tone medium-dark skin tone"]
    tokens = whole_tokens(captions, 24)
    full = clipfast.tokenize(captions)
    assert torch.equal(tokens, full[:, : tokens.shape[1]])
    assert full[:, tokens.shape[1] :].eq(0).all()
    assert whole_tokens(captions, tokens.shape[1]).shape == tokens.shape
    with pytest.raises(ValueError, match=f"got a context of 8 tokens, expected {tokens.shape[1]}"):
        whole_tokens(captions, 8)


def test_encoding_in_batches_is_encoding_at_once():
    inputs = torch.randn(7, 3)
    weight = torch.randn(3, 5, requires_grad=True)
    out = encode_all(lambda x: (x @ weight).bfloat16(), inputs, 2, torch.device("cpu"))
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert torch.equal(out, (inputs @ weight).bfloat16().float())
