"""Contrastive losses, forward and backward: clipfast's tiles, open_clip's ClipLoss and PyTorch's chunked cross-entropy.

pytest benchmarks/test_contrastive_loss.py
CLIPFAST_BENCH_BATCH=8192 CLIPFAST_BENCH_THREADS=2 pytest benchmarks/test_contrastive_loss.py
"""

from __future__ import annotations

import os
import statistics
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, paired, report_paired

from clipfast import ops

WIDTH = 512
ROUNDS = 5


def rivals():
    """Return every loss that can be had here, by name; one that cannot is named with the reason."""
    losses = {"clipfast": ops.contrastive_loss}
    try:
        from open_clip.loss import ClipLoss

        losses["open_clip ClipLoss"] = ClipLoss()
    except ImportError:
        losses["open_clip ClipLoss"] = None
    if hasattr(F, "linear_cross_entropy"):

        def both_directions(image, text, scale):
            labels = torch.arange(image.shape[0], device=image.device)
            return (
                F.linear_cross_entropy(scale * image, text, labels)
                + F.linear_cross_entropy(scale * text, image, labels)
            ) / 2

        losses["F.linear_cross_entropy"] = both_directions
    else:
        losses["F.linear_cross_entropy"] = None
    return losses


def step(loss, image, text, scale):
    for leaf in (image, text, scale):
        leaf.grad = None
    loss(image, text, scale).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_forward_and_backward(dtype, capsys):
    batch = int(os.environ.get("CLIPFAST_BENCH_BATCH", 32768 if DEVICE == "cuda" else 2048))
    if "CLIPFAST_BENCH_THREADS" in os.environ:
        torch.set_num_threads(int(os.environ["CLIPFAST_BENCH_THREADS"]))
    torch.manual_seed(0)
    image, noise = torch.randn(2, batch, WIDTH, device=DEVICE)
    text = F.normalize(image + noise, dim=1).to(dtype).requires_grad_()
    image = F.normalize(image, dim=1).to(dtype).requires_grad_()
    scale = torch.tensor(14.3, device=DEVICE, dtype=dtype, requires_grad=True)
    losses, gradients = rivals(), {}
    for name, loss in losses.items():
        if loss is not None:
            try:
                step(loss, image, text, scale)
            except RuntimeError as error:
                losses[name] = None
                with capsys.disabled():
                    print(f"\n  {name}: {str(error).splitlines()[0]}")
                continue
            gradients[name] = image.grad.float()
    for name, gradient in gradients.items():
        error = float((gradient - gradients["clipfast"]).abs().max() / gradients["clipfast"].abs().max())
        assert error < (1e-4 if dtype == torch.float32 else 0.1), f"{name}: {error:.1e} from clipfast"
    sides = {
        name: partial(step, loss, image, text, scale) if name in gradients else None for name, loss in losses.items()
    }
    times = paired(sides, ROUNDS)
    rates = {name: 8 * batch**2 * WIDTH / statistics.median(each) / 1e9 for name, each in times.items()}
    title = f"contrastive loss, forward and backward, B = {batch}, D = {WIDTH}, {dtype}"
    # a rate counts the 8·B²·D that clipfast does, whatever the side does
    report_paired(capsys, title, times, sides, items=batch, op="contrastive_loss", gflop_per_s=rates)
