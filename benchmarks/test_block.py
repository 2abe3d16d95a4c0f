"""One transformer block, forward and backward, beside open_clip's, transformers', timm's and torchvision's.

pytest benchmarks/test_block.py
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import DEVICE, DTYPE, ON_GPU, absent, by_scale, dtype_name, measure, rotating
from torch import Tensor, nn

import clipfast
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row
from clipfast.modules.block import ResidualAttentionBlock

# batch, tokens, width, heads: ViT-B-32, B-16, L-14
CASES = by_scale(
    smoke=[(2, 50, 128, 2)],
    short=[(8, 50, 768, 12), (4, 197, 768, 12)],
    full=[(16, 50, 768, 12), (8, 197, 768, 12), (8, 257, 1024, 16)],
    gpu=[(256, 50, 768, 12), (256, 197, 768, 12), (128, 257, 1024, 16)],
)

# where the weights of our block, which are named as open_clip's, lie in the others
PATHS = {
    "torchvision": {"attn.": "self_attention.", "mlp.c_fc.": "mlp.0.", "mlp.c_proj.": "mlp.3."},
    "timm": {
        "ln_1.": "norm1.",
        "ln_2.": "norm2.",
        "attn.in_proj_": "attn.qkv.",
        "attn.out_proj.": "attn.proj.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    },
    "transformers": {
        "ln_1.": "layer_norm1.",
        "ln_2.": "layer_norm2.",
        "attn.": "self_attn.",
        "mlp.c_fc.": "mlp.fc1.",
        "mlp.c_proj.": "mlp.fc2.",
    },
}


def open_clips(width: int, heads: int) -> nn.Module | str:
    if reason := absent("open_clip", "torchvision"):
        return reason
    from open_clip.transformer import ResidualAttentionBlock as TheirBlock

    return TheirBlock(width, heads)


def torchvisions(width: int, heads: int) -> nn.Module | str:
    if reason := absent("torchvision"):
        return reason
    from torchvision.models.vision_transformer import EncoderBlock

    return EncoderBlock(heads, width, 4 * width, 0.0, 0.0, partial(nn.LayerNorm, eps=1e-5))


def timms(width: int, heads: int) -> nn.Module | str:
    if reason := absent("timm"):
        return reason
    from timm.models.vision_transformer import Block

    return Block(width, heads, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-5))


def transformers_(width: int, heads: int) -> nn.Module | str:
    if reason := absent("transformers"):
        return reason
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    config = CLIPVisionConfig(**sizes, hidden_act="gelu", attn_implementation="sdpa")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = CLIPEncoderLayer(config)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x, None)
            return out[0] if isinstance(out, tuple) else out

    return Layer()


def with_weights_of(ours: nn.Module, theirs: nn.Module | str, layout: str) -> nn.Module | str:
    """Give another library's block our weights; a reason stays one."""
    if isinstance(theirs, str):
        return theirs
    state = {}
    for key, value in ours.state_dict().items():
        for mine, other in PATHS.get(layout, {}).items():
            if key.startswith(mine):
                key = other + key.removeprefix(mine)
                break
        state[key] = value
    if layout == "transformers":
        for end in ("weight", "bias"):
            packed = state.pop(f"self_attn.in_proj_{end}")
            state |= {f"self_attn.{n}_proj.{end}": part for n, part in zip("qkv", packed.chunk(3), strict=True)}
        state = {f"layer.{key}": value for key, value in state.items()}
    theirs.load_state_dict(state)
    return theirs.to(DEVICE, DTYPE)


def open_clips_block(ours: nn.Module, width: int, heads: int) -> nn.Module | None:
    """Return open_clip's block with the weights of ours, or None."""
    theirs = with_weights_of(ours, open_clips(width, heads), "open_clip")
    return None if isinstance(theirs, str) else theirs


@pytest.mark.parametrize(("batch", "tokens", "width", "heads"), CASES)
@pytest.mark.filterwarnings("ignore::clipfast.ops.FallbackWarning")
def test_block(batch, tokens, width, heads, benchmark):
    block = ResidualAttentionBlock(width, heads).to(DEVICE, DTYPE)
    grad = torch.randn(batch, tokens, width, device=DEVICE, dtype=DTYPE)

    def step(module, backend="auto"):
        if isinstance(module, str):
            return module

        def run(x):
            with clipfast.backend(backend):
                x = x.detach().requires_grad_()
                out = module(x)
                return out.detach(), torch.autograd.grad(out, (x, *module.parameters()), grad.to(x.dtype))[0]

        return run

    made = {"open_clip": open_clips, "transformers": transformers_, "timm": timms, "torchvision": torchvisions}
    rivals = {name: with_weights_of(block, make(width, heads), name) for name, make in made.items()}
    sides = {"clipfast": step(block)}
    if ON_GPU:
        sides["clipfast, triton"] = step(block, "triton")
    sides["PyTorch"] = step(block, "reference")
    sides |= {name: step(module) for name, module in rivals.items()}
    if not isinstance(rivals["open_clip"], str):
        sides["open_clip, compiled"] = step(torch.compile(rivals["open_clip"]))
    inputs = rotating(lambda: (torch.randn(batch, tokens, width, device=DEVICE, dtype=DTYPE),))
    x = inputs[0][0].double().requires_grad_()
    with clipfast.backend("reference"):
        exact = ResidualAttentionBlock(width, heads).to(DEVICE).double()
        exact.load_state_dict(block.state_dict())
        out = exact(x)
        oracle = [out.detach(), torch.autograd.grad(out, x, grad.double())[0]]
    positions = batch * tokens
    row = Row(
        op="block",
        name=f"block, forward and backward, [{batch}, {tokens}, {width}], {heads} heads, {dtype_name(DTYPE)}",
        label=f"{tokens} tokens of {width}",
        direction="forward and backward",
        dtype=dtype_name(DTYPE),
        unit="sequences",
        items=batch,
        # the linear layers' products, three times; attention's, 3.5 times
        flops=3 * 24 * positions * width**2 + 3.5 * 4 * positions * tokens * width,
        # weights and their gradients, x, y, dy, dx
        bytes=DTYPE.itemsize * (2 * sum(p.numel() for p in block.parameters()) + 4 * positions * width),
    )
    measure(benchmark, row, sides, inputs, oracle=Oracle(oracle, "PyTorch"), saves=True)
