"""Contrastive losses, forward and backward: clipfast's tiles, open_clip's ClipLoss and PyTorch's chunked cross-entropy.

pytest benchmarks/test_contrastive_loss.py
CLIPFAST_BENCH_BATCH=8192 CLIPFAST_BENCH_THREADS=2 pytest benchmarks/test_contrastive_loss.py
"""

from __future__ import annotations

import os
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from harness import report

from clipfast import ops

WIDTH = 512
ROUNDS = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    if DEVICE == "cuda":
        torch.cuda.synchronize()


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
    losses, times, gradients = rivals(), {}, {}
    for name, loss in losses.items():
        if loss is not None:
            try:
                step(loss, image, text, scale)
            except RuntimeError as error:
                losses[name] = None
                with capsys.disabled():
                    print(f"\n  {name}: {str(error).splitlines()[0]}")
                continue
            gradients[name], times[name] = image.grad.float(), []
    for name, gradient in gradients.items():
        error = float((gradient - gradients["clipfast"]).abs().max() / gradients["clipfast"].abs().max())
        assert error < (1e-4 if dtype == torch.float32 else 0.1), f"{name}: {error:.1e} from clipfast"
    for _ in range(ROUNDS):
        for name, each in times.items():
            began = time.perf_counter()
            step(losses[name], image, text, scale)
            each.append(time.perf_counter() - began)
    # rounds are paired: each rival is compared with what ran beside it
    ratios = {
        name: statistics.median(t / mine for t, mine in zip(each, times["clipfast"], strict=True))
        for name, each in times.items()
    }
    medians = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    missing = [name for name in losses if name not in times]
    title = (
        f"contrastive loss, forward and backward, B = {batch}, D = {WIDTH}, {dtype}, {torch.get_num_threads()} threads"
    )
    report(capsys, title, medians, op="contrastive_loss", ratios=ratios, missing=missing)
    with capsys.disabled():
        for name, ratio in ratios.items():
            rate = 8 * batch**2 * WIDTH / medians[name] / 1e6
            print(f"  {name:<28} {ratio:5.2f} × clipfast's time, {rate:6.0f} GFLOP/s of 8·B²·D")
        for name in missing:
            print(f"  {name:<28} not installed")
