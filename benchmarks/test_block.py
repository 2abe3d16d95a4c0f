"""One transformer block, forward and backward: clipfast's on each backend, open_clip's where it is installed.

pytest benchmarks/test_block.py
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from harness import DEVICE, ON_GPU, assert_close, milliseconds, report, rotating

import clipfast
from clipfast.modules.transformer import ResidualAttentionBlock

# batch, tokens, width, heads: ViT-B-32, B-16, L-14
CASES = [(256, 50, 768, 12), (256, 197, 768, 12), (128, 257, 1024, 16)] if ON_GPU else [(2, 50, 64, 2)]
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


def open_clips_block(ours, width, heads):
    """Return open_clip's block with the same weights, or None."""
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("torchvision") is None:
        return None
    if not ON_GPU:  # torchvision has no CPU build, and its Python half wants these two schemas
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from open_clip.transformer import ResidualAttentionBlock as TheirBlock

    theirs = TheirBlock(width, heads).to(DEVICE, DTYPE)
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.parametrize(("batch", "tokens", "width", "heads"), CASES)
@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
def test_block(batch, tokens, width, heads, capsys):
    torch.manual_seed(0)
    block = ResidualAttentionBlock(width, heads).to(DEVICE, DTYPE)
    theirs = open_clips_block(block, width, heads)
    grad = torch.randn(batch, tokens, width, device=DEVICE, dtype=DTYPE)

    def step(module, backend="auto"):
        def run(x):
            with clipfast.backend(backend):
                x = x.detach().requires_grad_()
                out = module(x)
                return torch.autograd.grad(out, (x, *module.parameters()), grad)[0], out.detach()

        return run

    variants = {"clipfast, auto": step(block), "clipfast, reference": step(block, "reference")}
    if theirs is not None:
        variants["open_clip"] = step(theirs)
    if ON_GPU:
        variants["clipfast, triton"] = step(block, "triton")
        if theirs is not None:
            variants["open_clip, torch.compile"] = step(torch.compile(theirs))
    inputs = rotating(lambda: (torch.randn(batch, tokens, width, device=DEVICE, dtype=DTYPE),))
    assert_close(variants, inputs[0])
    times = milliseconds(variants, inputs)
    report(capsys, f"block, forward and backward, [{batch}, {tokens}, {width}], {heads} heads, {DTYPE}", times)
