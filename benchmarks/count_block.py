"""Count the operators of a transformer block that touch memory, and the bytes of those that are no matrix products.

    TRITON_INTERPRET=1 python benchmarks/count_block.py

A block within a stack is counted: what three of them take more than two. Every operator that PyTorch dispatches is
seen, forward and backward; views are free, and each other one reads its tensors and writes its results once. Attention
is one operator, whose own workings are not counted, nor are the casts of weights and of their gradients under autocast.
Bytes are given for every token and channel: bytes / (tokens · width).
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clipfast
from clipfast.modules.block import ResidualAttentionBlock
from clipfast.modules.transformer import Transformer

# as many rows as no weight has
BATCH, TOKENS, WIDTH, HEADS = 4, 60, 256, 4
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv")
FREE = ("detach", "empty", "empty_like", "new_empty", "_unsafe_view", "expand", "squeeze_")
# the backward kernels with sums over rows launch the second stage too
TWO_KERNELS = ("layer_norm_backward", "add_layer_norm_backward", "bias_gelu_backward")
# what is given to the first block, and whether autocast is on. An image tower's stream is what its convolution gives;
# a text tower's begins in the dtype of the embeddings.
MODES = {
    "bfloat16": (torch.bfloat16, False),
    "autocast, images (bfloat16 stream)": (torch.bfloat16, True),
    "autocast, text (float32 stream)": (torch.float32, True),
}


class Count(TorchDispatchMode):
    """Counts operators and bytes by kind.

    Args:
        weights: The shapes of weights, whose casts are left out.
    """

    def __init__(self, weights: set[torch.Size]) -> None:
        super().__init__()
        self.kernels, self.bytes, self.names, self.weights = Counter(), Counter(), Counter(), weights

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        written = [t for t in tree_leaves(results) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in read}
        free = function.is_view or name in FREE
        if (
            free
            or not written
            or (name in ("_to_copy", "reshape") and all(t.untyped_storage().data_ptr() in storages for t in written))
            or (name == "_to_copy" and written[0].shape in self.weights)
        ):
            return results
        attends = "scaled_dot_product" in name or name.startswith("attention")
        kind = "attention" if attends else "product" if name in PRODUCTS else "elementwise"
        self.kernels[kind] += 2 if name in TWO_KERNELS else 1
        self.bytes[kind] += sum(t.numel() * t.element_size() for t in read + written)
        self.names[name] += kind == "elementwise"
        return results

    def minus(self, other: Count) -> Count:
        """Return what this has counted more than another."""
        rest = Count(self.weights)
        for name in ("kernels", "bytes", "names"):
            getattr(rest, name).update(getattr(self, name))
            getattr(rest, name).subtract(getattr(other, name))
        return rest


def passes(module: nn.Module, backend: str, dtype: torch.dtype, autocast: bool) -> list[Count]:
    """Return what the forward and the backward pass of a stack of blocks take."""
    x = torch.randn(BATCH, TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    weights = {p.shape for p in module.parameters()}
    forward, backward = Count(weights), Count(weights)
    with clipfast.backend(backend):
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext(), forward:
            out = module(x)
        grad = torch.randn_like(out)
        with backward:
            torch.autograd.grad(out, (x, *module.parameters()), grad)
    return [forward, backward]


def per_channel(counted: Count) -> float:
    """Return the bytes, for every token and channel, of operators that are neither products nor attention."""
    return counted.bytes["elementwise"] / (BATCH * TOKENS * WIDTH)


def block_of(make, backend: str, mode: str) -> list[Count]:
    """Return the counts of the forward and the backward pass of one block within a stack.

    Args:
        make: Returns a stack of so many blocks.
        backend: Of clipfast's ops.
        mode: A key of :data:`MODES`.
    """
    dtype, autocast = MODES[mode]
    stacks = (make(layers).to(torch.float32 if autocast else dtype) for layers in (3, 2))
    long, short = (passes(stack, backend, dtype, autocast) for stack in stacks)
    return [one.minus(other) for one, other in zip(long, short, strict=True)]


def ours(layers: int) -> nn.Module:
    """Return a stack of our blocks."""
    return Transformer(WIDTH, layers, HEADS)


def open_clips(layers: int) -> nn.Module:
    """Return a stack of open_clip's blocks."""
    from test_block import open_clips_block

    block = ResidualAttentionBlock(WIDTH, HEADS)
    return nn.Sequential(*(open_clips_block(block, WIDTH, HEADS) for _ in range(layers)))


def main() -> None:
    """Print the counts of every library and mode."""
    sys.path.append(str(Path(__file__).parent))
    import conftest  # noqa: F401  # torchvision's schemas, which open_clip's import needs
    from harness import absent

    sides = {"clipfast, PyTorch": (ours, "auto"), "clipfast, Triton": (ours, "triton")}
    if not absent("open_clip", "torchvision"):
        sides = {"open_clip": (open_clips, "auto")} | sides
    for mode in MODES:
        print(f"{mode}:")
        for name, (make, backend) in sides.items():
            both = block_of(make, backend, mode)
            for direction, counted in zip(("forward", "backward"), both, strict=True):
                print(
                    f"  {name}, {direction}: {counted.kernels['product']} products, "
                    f"{counted.kernels['attention']} attention, {counted.kernels['elementwise']} others with "
                    f"{per_channel(counted):.1f} bytes: {dict(+counted.names)}"
                )
            print(f"  {name}, both: {sum(map(per_channel, both)):.1f} bytes")


if __name__ == "__main__":
    main()
