"""Packed captions and the one-token last block under DDP: one process with the joined batch, all tokens computed."""

from __future__ import annotations

import torch
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import clipfast

LENGTHS = [3, 12, 16, 2, 9, 9, 5, 7]


def model_and_batch() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    }
    model = clipfast.create_model(config, dtype=torch.float64)
    tokens = torch.randint(1, 48, (len(LENGTHS), 16))
    tokens[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1] = 49
    return model, torch.randn(len(LENGTHS), 3, 16, 16, dtype=torch.float64), tokens


def trained(model: nn.Module, images: Tensor, tokens: Tensor) -> list:
    """Return the parameters after three steps on a loss that is a mean over the batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        image, text, scale = model(images, tokens)
        (scale * (image * text).sum(-1) + (image - text).abs().sum(-1)).mean().backward()
        optimizer.step()
    return [p.detach().tolist() for p in model.parameters()]


def on_a_rank(rank: int, ranks: int) -> list:
    model, images, tokens = model_and_batch()
    return trained(DistributedDataParallel(model), images.chunk(ranks)[rank], tokens.chunk(ranks)[rank])


def test_ddp_is_one_process_that_computes_every_token() -> None:
    with clipfast.exact_shortcuts(False):
        expected = trained(*model_and_batch())
    for parameters in run_on_ranks(on_a_rank, 2):
        for actual, wanted in zip(parameters, expected, strict=True):
            torch.testing.assert_close(torch.tensor(actual), torch.tensor(wanted), rtol=0, atol=1e-12)
