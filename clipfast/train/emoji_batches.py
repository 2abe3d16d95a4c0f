"""Emoji pairs as a model takes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from clipfast.data.emoji_pairs import EmojiPairs
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.transform import OPENAI_MEAN, OPENAI_STD


def whole_tokens(captions: list[str], context_length: int) -> Tensor:
    """Tokenize captions of which none may be cut short.

    Returns:
        int64 ``[N, L]`` with L tokens for the longest caption: nothing after a caption's EOS changes its features.

    Raises:
        ValueError: A caption needs more than ``context_length`` tokens.
    """
    tokens = Tokenizer()(captions)
    longest = int((tokens != 0).sum(dim=1).max())
    if longest > context_length:
        raise ValueError(f"model: got a context of {context_length} tokens, expected {longest} for the longest caption")
    return tokens[:, :longest]


def normalized_pixels(pictures: np.ndarray) -> Tensor:
    """Turn uint8 ``[N, S, S, 3]`` into float32 ``[N, 3, S, S]`` with CLIP's mean and standard deviation."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_MEAN, OPENAI_STD))
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std


def training_batches(pairs: EmojiPairs, tokens: Tensor, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(images, tokens)`` of the training pairs without end: every epoch in a new order, whole batches only."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(pairs.train_indices)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            chosen = order[start : start + batch_size]
            yield normalized_pixels(pairs.pictures[chosen]), tokens[chosen]


@torch.no_grad()
def encode_all(encode: Callable[[Tensor], Tensor], inputs: Tensor, batch_size: int, device: torch.device) -> Tensor:
    """Encode N inputs a batch at a time; float32 ``[N, D]`` on the CPU."""
    return torch.cat([encode(batch.to(device)).float().cpu() for batch in inputs.split(batch_size)])
