"""SigLIP's towers: images through a MAP head, and texts of 64 tokens that all count, beside the rivals.

pytest benchmarks/test_siglip.py

Weights are random and shared, so that every side computes the same numbers. There is nothing to leave out here but the
last block's queries of the text, which is read at its last token.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, absent, by_scale, dtype_name, measure
from torch import Tensor, nn
from towers import DEPTH, compiled, exact_features, in_inference_mode, operations, reference

import clipfast
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row
from clipfast.console import counted
from clipfast.models.key_layouts import from_openai

SMALL = {
    "embed_dim": 128,
    "init_logit_bias": -10.0,
    "vision_cfg": {
        "image_size": 64, "patch_size": 16, "width": 128, "layers": 2, "head_width": 64, "pool_type": "map",
        "class_token": False, "no_ln_pre": True, "patch_bias": True, "norm_eps": 1e-6, "proj_type": "none",
    },
    "text_cfg": {
        "context_length": 64, "vocab_size": 1000, "width": 128, "heads": 2, "layers": 2, "pool_type": "last",
        "no_causal_mask": True, "proj_bias": True, "norm_eps": 1e-6,
    },
}  # fmt: skip
NAME = by_scale(smoke="small", short="ViT-B-16-SigLIP", full="ViT-B-16-SigLIP")
DTYPES = [torch.bfloat16, torch.float32]
# float32 takes twice as long on a CPU
IMAGES = {
    torch.bfloat16: by_scale(smoke=[2], short=[4], full=[1, 4, 16], gpu=[1, 16, 256]),
    torch.float32: by_scale(smoke=[2], short=[1], full=[1, 4, 16], gpu=[1, 16, 256]),
}
TEXTS = by_scale(smoke=2, short=4, full=32, gpu=512)


@functools.cache
def model() -> clipfast.CLIP:
    return clipfast.create_model(SMALL if NAME == "small" else NAME).eval()


def mine_in(dtype: torch.dtype) -> clipfast.CLIP:
    """Return clipfast's model in a dtype; those of one dtype have the same weights."""
    mine = clipfast.create_model(model().config)
    mine.load_state_dict(model().state_dict())
    return mine.eval().to(DEVICE, dtype)


def open_clips(dtype: torch.dtype) -> nn.Module | str:
    """Return open_clip's model with the same weights, or why not."""
    if reason := absent("open_clip", "timm", "torchvision"):
        return reason
    if NAME == "small":
        return "has no such model"
    import open_clip

    theirs = open_clip.create_model(NAME)
    theirs.load_state_dict(from_openai(model().state_dict(), "open_clip"), strict=False)
    return theirs.eval().to(DEVICE, dtype)


def transformers_model(dtype: torch.dtype) -> nn.Module | str:
    """Return transformers' model with the same weights and, as open_clip's, the erf GELU, or why not."""
    if reason := absent("transformers", "torchvision"):
        return reason
    from transformers import SiglipConfig, SiglipModel

    vision, text = model().config.vision_cfg, model().config.text_cfg
    common = {"hidden_act": "gelu", "layer_norm_eps": vision.norm_eps}
    theirs = SiglipModel(
        SiglipConfig(
            vision_config=common
            | {
                "hidden_size": vision.width,
                "intermediate_size": int(vision.mlp_ratio * vision.width),
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.width // vision.head_width,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
            },
            text_config=common
            | {
                "hidden_size": text.width,
                "intermediate_size": int(text.mlp_ratio * text.width),
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "vocab_size": text.vocab_size,
                "max_position_embeddings": text.context_length,
                "projection_size": model().config.embed_dim,
            },
        )
    )
    theirs.load_state_dict(from_openai(model().state_dict(), "transformers"), strict=False)
    return theirs.eval().to(DEVICE, dtype)


def side(theirs: nn.Module | str, encode: Callable[[nn.Module], Callable[[Tensor], Tensor]]) -> object:
    return theirs if isinstance(theirs, str) else encode(theirs)


def row_of(mine: clipfast.CLIP, call: Callable[[], object], items: int, unit: str, dtype: torch.dtype) -> Row:
    tower = mine.visual if unit == "images" else mine.transformer
    words = f"{NAME}, {counted(items, unit[:-1])}"
    return Row(
        op="towers",
        name=f"{words}{'' if unit == 'images' else ' of 64 tokens'}, {dtype_name(dtype)}",
        label=f"{words}, {dtype_name(dtype)}",
        direction="forward",
        dtype=dtype_name(dtype),
        unit=unit,
        items=items,
        flops=operations(call),
        # of the embedding's rows only those of the tokens are read
        bytes=dtype.itemsize * sum(p.numel() for p in tower.parameters()),
    )


@pytest.mark.parametrize(("dtype", "count"), [(d, n) for d in DTYPES for n in IMAGES[d]], ids=str)
def test_siglip_images(dtype: torch.dtype, count: int, benchmark: object) -> None:
    mine = mine_in(dtype)
    images = torch.randn(count, 3, *mine.visual.image_size).to(DEVICE, dtype)
    theirs = side(open_clips(dtype), lambda model: model.visual)
    sides = {
        "clipfast": mine.encode_image,
        "PyTorch": reference(mine.encode_image),
        "open_clip": theirs,
        "transformers": side(
            transformers_model(dtype), lambda model: lambda images: model.vision_model(images).pooler_output
        ),
    }
    if dtype == torch.bfloat16 and count == IMAGES[dtype][-1]:  # what takes long to build is built once
        sides["open_clip, compiled, frozen"] = compiled(theirs)
    row = row_of(mine, lambda: mine.encode_image(images), count, "images", dtype)
    exact = exact_features(lambda model: model.encode_image(images.double()), mine)
    oracle = Oracle([exact], "PyTorch", factor=DEPTH)
    measure(benchmark, row, in_inference_mode(sides), [(images,)], oracle=oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_siglip_texts(dtype: torch.dtype, benchmark: object) -> None:
    mine = mine_in(dtype)
    text = mine.config.text_cfg
    tokens = torch.randint(2, text.vocab_size, (TEXTS, text.context_length), device=DEVICE)
    sides = {
        "clipfast": mine.encode_text,
        "PyTorch": reference(mine.encode_text),
        "open_clip": side(open_clips(dtype), lambda model: model.encode_text),
        "transformers": side(
            transformers_model(dtype), lambda model: lambda tokens: model.text_model(input_ids=tokens).pooler_output
        ),
    }
    row = row_of(mine, lambda: mine.encode_text(tokens), TEXTS, "texts", dtype)
    exact = exact_features(lambda model: model.encode_text(tokens), mine)
    oracle = Oracle([exact], "PyTorch", factor=DEPTH)
    measure(benchmark, row, in_inference_mode(sides), [(tokens,)], oracle=oracle)
