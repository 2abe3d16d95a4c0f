"""Models of the libraries that clipfast is compared with, small or whole, always with random weights."""

from __future__ import annotations

import open_clip
import torch
from torch import Tensor, nn

EOS_ID = 49407


def open_clip_model(name: str, **changes: dict) -> nn.Module:
    """Return open_clip's model of that name; ``vision_cfg`` and ``text_cfg`` update its configuration."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in open_clip.get_model_config(name).items()}
    for part, update in changes.items():
        config[part].update(update)
    return open_clip.CLIP(**config)


def captions(batch: int, context_length: int = 77, vocab_size: int = 49408, seed: int = 0) -> Tensor:
    """Return random token ids ``[B, L]`` with the EOS at different places and zeros after it."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, vocab_size - 2, (batch, context_length), generator=generator)
    ends = torch.randint(1, context_length, (batch,), generator=generator)
    tokens[:, 0] = vocab_size - 2
    tokens[torch.arange(batch), ends] = vocab_size - 1
    tokens[torch.arange(context_length) > ends[:, None]] = 0
    return tokens
