"""What one line does to the model that one has: ``clipfast.accelerate`` on models of open_clip and transformers.

pytest benchmarks/test_accelerate.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, absent, dtype_name, measure
from test_towers import DTYPES, MODELS, PROMPTS, SMALL, create, open_clips, transformers_model, zero_shot_prompts
from torch import Tensor, nn
from towers import DEPTH, in_inference_mode, operations

import clipfast
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row
from clipfast.console import counted

IMAGES = 4


def open_clips_scores(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, tokens: model.get_logits(images, tokens)[0]


def transformers_scores(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda images, tokens: model(input_ids=tokens, pixel_values=images).logits_per_image


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("name", MODELS)
def test_zero_shot(name: str, library: str, dtype: torch.dtype, benchmark: object) -> None:
    """Images scored against prompts, as a program does that calls the library's own model."""
    mine = create(name, dtype)
    theirs = open_clips(name, mine) if library == "open_clip" else transformers_model(mine)
    if isinstance(theirs, str):
        pytest.skip(f"{library}: {theirs}")
    scores = open_clips_scores if library == "open_clip" else transformers_scores
    accelerated = clipfast.accelerate(copy.deepcopy(theirs))
    images = torch.randn(IMAGES, 3, 224, 224).to(DEVICE, dtype)
    tokens = clipfast.tokenize(zero_shot_prompts(PROMPTS)).to(DEVICE)
    whose = "open_clip's" if library == "open_clip" else "transformers'"
    words = f"{whose} {name}, {counted(IMAGES, 'image')} against {PROMPTS} prompts, {dtype_name(dtype)}"
    row = Row(
        op="accelerate",
        name=words,
        label=words,
        direction="forward",
        dtype=dtype_name(dtype),
        unit="scores",
        items=IMAGES * PROMPTS,
        flops=operations(lambda: (mine.encode_image(images), mine.encode_text(tokens))),
        bytes=dtype.itemsize * sum(p.numel() for p in mine.parameters()),
    )
    with torch.no_grad():
        exact = scores(copy.deepcopy(theirs).double())(images.double(), tokens)
    oracle = Oracle([exact], library, factor=DEPTH)
    sides = {"clipfast": scores(accelerated), library: scores(theirs)}
    measure(benchmark, row, in_inference_mode(sides), [(images, tokens)], oracle=oracle)


@pytest.mark.parametrize("name", MODELS)
def test_padded_captions(name: str, benchmark: object) -> None:
    """transformers' text tower behind a processor's mask: captions of 10 tokens, padded to 77."""
    if reason := absent("transformers"):
        pytest.skip(reason)
    from transformers import CLIPTextConfig, CLIPTextModel

    text = clipfast.create_model(SMALL if name == "small" else name).config.text_cfg
    theirs = CLIPTextModel(
        CLIPTextConfig(
            hidden_size=text.width,
            intermediate_size=4 * text.width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            hidden_act="gelu",
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=49407,
        )
    )
    theirs = theirs.eval().to(DEVICE)
    mine = clipfast.accelerate(copy.deepcopy(theirs))
    tokens = torch.randint(1, 49000, (PROMPTS, 77), device=DEVICE)
    tokens[:, 0], tokens[:, 9:] = 49406, 49407
    mask = (torch.arange(77, device=DEVICE) < 10).long().expand(PROMPTS, 77)

    def pooled(model: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda tokens: model(input_ids=tokens, attention_mask=mask).pooler_output

    row = Row(
        op="accelerate",
        name=f"{name}, {PROMPTS} captions of 10 tokens padded to 77 with transformers' mask, float32",
        label=f"{name}, {PROMPTS} padded captions",
        direction="forward",
        dtype="float32",
        unit="captions",
        items=PROMPTS,
        flops=operations(lambda: mine(input_ids=tokens)),
        bytes=4 * sum(p.numel() for p in theirs.encoder.parameters()),
    )
    with torch.no_grad():
        exact = pooled(copy.deepcopy(theirs).double())(tokens)
    oracle = Oracle([exact], "transformers", factor=DEPTH)
    sides = {"clipfast": pooled(mine), "transformers": pooled(theirs)}
    measure(benchmark, row, in_inference_mode(sides), [(tokens,)], oracle=oracle)
