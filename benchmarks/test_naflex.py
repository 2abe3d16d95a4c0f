"""Pictures of mixed aspects through SigLIP 2's NaFlex tower, packed, beside transformers', padded and masked.

pytest benchmarks/test_naflex.py

Weights are random and shared. Each side is given its own form of the same patches: what the processors do is not timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, absent, by_scale, dtype_name, measure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import clipfast
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row
from clipfast.data.naflex import patch_grid

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {
        "image_size": 64, "patch_size": 16, "width": 64, "layers": 2, "head_width": 32, "pool_type": "map",
        "class_token": False, "no_ln_pre": True, "patch_bias": True, "norm_eps": 1e-6, "proj_type": "none",
        "naflex": True, "approximate": "tanh",
    },
    "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 2, "layers": 1},
}  # fmt: skip
NAME = by_scale(smoke="small", short="ViT-B-16-SigLIP2-NaFlex", full="ViT-B-16-SigLIP2-NaFlex")
MAX_PATCHES = by_scale(smoke=16, short=256, full=256)
PICTURES = by_scale(smoke=3, short=16, full=16, gpu=64)
TRAINED = by_scale(smoke=3, short=4, full=16, gpu=64)
DTYPES = [torch.bfloat16, torch.float32]
# as benchmarks/test_towers.py
DEPTH = 4.0

# (height, width) of photographs, phones' and screens' pictures, a banner, a panorama and a strip
SIZES = [
    (480, 640), (640, 480), (427, 640), (640, 427), (512, 512), (333, 500), (1080, 1920), (1600, 900), (1200, 630),
    (375, 500), (2000, 1500), (500, 1500), (400, 1600), (90, 728), (1920, 1080), (1024, 1024),
]  # fmt: skip

# the budget of each picture: one for all, which the processor scales every picture up to, or one each, as where whole
# pictures come with parts of them
BUDGETS = {"one budget": (1,), "three budgets": (1, 2, 4)}

_KEYS = (
    ("transformer.resblocks.", "encoder.layers."),
    ("attn_pool.attn.", "head.attention."),
    ("attn_pool.ln.", "head.layernorm."),
    ("attn_pool.", "head."),
    (".attn.", ".self_attn."),
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("c_fc", "fc1"),
    ("c_proj", "fc2"),
    ("ln_post", "post_layernorm"),
    ("conv1.", "embeddings.patch_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
)


def transformers_tower(mine: nn.Module, vision: clipfast.VisionConfig) -> nn.Module | str:
    """Return transformers' tower with the same weights, or why not."""
    if reason := absent("transformers", "torchvision"):
        return reason
    from transformers import Siglip2VisionConfig, Siglip2VisionModel

    sizes = {
        "hidden_size": vision.width,
        "intermediate_size": int(vision.mlp_ratio * vision.width),
        "num_hidden_layers": vision.layers,
        "num_attention_heads": vision.width // vision.head_width,
        "num_patches": len(mine.positional_embedding),
        "patch_size": vision.patch_size,
    }
    theirs = Siglip2VisionModel(Siglip2VisionConfig(**sizes))
    state: dict[str, Tensor] = {}
    for key, value in mine.state_dict().items():
        for old, new in _KEYS:
            key = key.replace(old, new)
        if ".self_attn.in_proj_" in key:
            state |= {key.replace("in_proj_", f"{p}_proj."): v for p, v in zip("qkv", value.chunk(3), strict=True)}
        elif key == "embeddings.patch_embedding.weight":
            state[key] = value.permute(0, 2, 3, 1).flatten(1)
        else:
            state[key] = value[None, None] if key == "head.probe" else value
    theirs.load_state_dict(state)
    parameter = next(mine.parameters())
    return theirs.to(parameter.device, parameter.dtype).train(mine.training)


def padded(batch: clipfast.NaFlexBatch) -> dict[str, Tensor]:
    """Return a batch in the form of transformers' processor."""
    pixels, mask = [], []
    for patches in batch.patches.split(batch.lengths.tolist()):
        patches = patches.unflatten(1, (3, -1)).transpose(1, 2).flatten(1)
        pixels.append(F.pad(patches, (0, 0, 0, MAX_PATCHES - len(patches))))
        mask.append((torch.arange(MAX_PATCHES, device=batch.device) < len(patches)).int())
    return {
        "pixel_values": torch.stack(pixels),
        "pixel_attention_mask": torch.stack(mask),
        "spatial_shapes": batch.grids,
    }


def make(count: int, dtype: torch.dtype, budgets: str) -> tuple[nn.Module, nn.Module | str, clipfast.NaFlexBatch]:
    """Return clipfast's tower, transformers' and a batch of so many pictures."""
    model = clipfast.create_model(SMALL if NAME == "small" else NAME)
    mine = model.visual.to(DEVICE, dtype)
    parts = BUDGETS[budgets]
    grids = [
        patch_grid(*SIZES[i % len(SIZES)], MAX_PATCHES // parts[i % len(parts)], mine.patch_size) for i in range(count)
    ]
    total = sum(rows * columns for rows, columns in grids)
    batch = clipfast.NaFlexBatch(torch.randn(total, 3 * mine.patch_size**2).to(DEVICE, dtype), grids)
    return mine, transformers_tower(mine, model.config.vision_cfg), batch


def in_plain_pytorch(function: Callable[..., object]) -> Callable[..., object]:
    def run(*arguments: object) -> object:
        with clipfast.backend("reference"):
            return function(*arguments)

    return run


def row_of(batch: clipfast.NaFlexBatch, mine: nn.Module, direction: str, words: str) -> Row:
    """Return a row whose operations are those of the pictures' own patches."""
    dtype, counter = batch.dtype, FlopCounterMode(display=False)
    with torch.no_grad(), clipfast.backend("reference"), counter:
        mine(batch)
    fill = batch.total / (len(batch) * MAX_PATCHES)
    return Row(
        op="towers",
        name=f"{NAME}, {words} of {len(batch)} pictures within {MAX_PATCHES} patches, {dtype_name(dtype)}",
        label=f"{NAME}, {words}, {dtype_name(dtype)}",
        direction=direction,
        dtype=dtype_name(dtype),
        unit="images",
        items=len(batch),
        flops=float(counter.get_total_flops()) * (1 if direction == "forward" else 3),
        bytes=dtype.itemsize * (batch.patches.numel() + sum(p.numel() for p in mine.parameters())),
        facts={"filled": fill},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("budgets", BUDGETS)
def test_naflex_features(budgets: str, dtype: torch.dtype, benchmark: object) -> None:
    mine, theirs, batch = make(PICTURES, dtype, budgets)
    mine.eval()
    sides: dict = {"clipfast": mine, "PyTorch": in_plain_pytorch(mine)}
    if isinstance(theirs, str):
        sides["transformers"] = theirs
    else:
        theirs.eval()
        inputs = padded(batch)
        sides["transformers"] = lambda _: theirs(**inputs).pooler_output
    with torch.no_grad(), clipfast.backend("reference"):
        exact = copy.deepcopy(mine).double()(batch.to(torch.float64))
    sides = {name: side if isinstance(side, str) else torch.inference_mode()(side) for name, side in sides.items()}
    oracle = Oracle([exact], "PyTorch", factor=DEPTH)
    measure(benchmark, row_of(batch, mine, "forward", f"features ({budgets})"), sides, [(batch,)], oracle=oracle)


def test_naflex_gradients(benchmark: object) -> None:
    """Float32: features and the gradients of all parameters; checked are the features and the gradients' norm."""
    mine, theirs, batch = make(TRAINED, torch.float32, "one budget")

    def step(model: nn.Module, encode: Callable[[object], Tensor]) -> Callable[[object], list[Tensor]]:
        def run(batch: object) -> list[Tensor]:
            model.zero_grad(set_to_none=True)
            features = encode(batch)
            features.square().sum().backward()
            return [features.detach(), nn.utils.get_total_norm([p.grad for p in model.parameters()])]

        return run

    exact = copy.deepcopy(mine).double()
    oracle = in_plain_pytorch(step(exact, exact))(batch.to(torch.float64))
    sides: dict = {"clipfast": step(mine, mine)}
    other = copy.deepcopy(mine)
    sides["PyTorch"] = in_plain_pytorch(step(other, other))
    if isinstance(theirs, str):
        sides["transformers"] = theirs
    else:
        inputs = padded(batch)
        sides["transformers"] = step(theirs, lambda _: theirs(**inputs).pooler_output)
    row = row_of(batch, mine, "step", "gradients")
    measure(benchmark, row, sides, [(batch,)], oracle=Oracle(oracle, "PyTorch", factor=DEPTH), saves=True)
