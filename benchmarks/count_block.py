"""Count the operators of a transformer block that touch memory, and the bytes of those that are no matrix products.

    TRITON_INTERPRET=1 python benchmarks/count_block.py

Every operator that PyTorch dispatches is seen, forward and backward, in pure bfloat16; views are free, and each other
one reads its tensors and writes its results once. Attention is one operator, whose own workings are not counted. Bytes
are given for every token and channel: bytes / (tokens · width).
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clipfast
from clipfast.modules.transformer import ResidualAttentionBlock

sys.path.append(str(Path(__file__).parent))
from test_block import open_clips_block

BATCH, TOKENS, WIDTH, HEADS = 4, 64, 256, 4
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
# the backward kernels with sums over rows launch the second stage too
TWO_KERNELS = ("layer_norm_backward", "add_layer_norm_backward", "bias_gelu_backward")


class Count(TorchDispatchMode):
    """Counts operators and bytes by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels, self.bytes, self.names = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in read}
        free = function.is_view or name in ("detach", "empty", "empty_like", "new_empty", "_unsafe_view", "expand")
        if (
            free
            or not written
            or (name in ("_to_copy", "reshape") and all(t.untyped_storage().data_ptr() in storages for t in written))
        ):
            return results
        attends = "scaled_dot_product" in name or name.startswith("attention")
        kind = "attention" if attends else "product" if name in PRODUCTS else "elementwise"
        self.kernels[kind] += 2 if name in TWO_KERNELS else 1
        self.bytes[kind] += sum(t.numel() * t.element_size() for t in read + written)
        self.names[name] += kind == "elementwise"
        return results


def count(name: str, module: torch.nn.Module, backend: str) -> None:
    """Print what a forward and a backward pass of a block take."""
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with clipfast.backend(backend):
        with Count() as forward:
            out = module(x)
        grad = torch.randn_like(out)
        with Count() as backward:
            torch.autograd.grad(out, (x, *module.parameters()), grad)
    for direction, counted in (("forward", forward), ("backward", backward)):
        per_channel = counted.bytes["elementwise"] / (BATCH * TOKENS * WIDTH)
        print(
            f"{name}, {direction}: {counted.kernels['product']} products, {counted.kernels['attention']} attention, "
            f"{counted.kernels['elementwise']} others with {per_channel:.1f} bytes: {dict(+counted.names)}"
        )


if __name__ == "__main__":
    ours = ResidualAttentionBlock(WIDTH, HEADS).bfloat16()
    theirs = open_clips_block(ours, WIDTH, HEADS)
    if theirs is not None:
        count("open_clip", theirs.bfloat16(), "auto")
    count("clipfast, PyTorch", ours, "auto")
    count("clipfast, Triton", ours, "triton")
