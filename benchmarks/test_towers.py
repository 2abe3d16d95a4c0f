"""Whole towers: images, zero-shot prompts and a training step, dense and with exact shortcuts, beside the rivals.

CLIPFAST_BENCH_THREADS=2 pytest benchmarks/test_towers.py            every side under the allocator's defaults
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 CLIPFAST_BENCH_THREADS=2 \
    pytest benchmarks/test_towers.py                                 every side keeps its pages

CLIPFAST_BENCH_MODELS (by default ViT-B-32), CLIPFAST_BENCH_IMAGES and CLIPFAST_BENCH_PROMPTS set the sizes; several
models are separated by commas. Weights are random and shared, so that every side computes the same numbers.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, paired, report_paired
from torch import Tensor

import clipfast

open_clip = pytest.importorskip("open_clip", reason="the towers' weights and rivals are open_clip's")

MODELS = os.environ.get("CLIPFAST_BENCH_MODELS", "ViT-B-32").split(",")
IMAGES = int(os.environ.get("CLIPFAST_BENCH_IMAGES", 4))
PROMPTS = int(os.environ.get("CLIPFAST_BENCH_PROMPTS", 16))
ROUNDS = int(os.environ.get("CLIPFAST_BENCH_ROUNDS", 3))
THREADS = int(os.environ.get("CLIPFAST_BENCH_THREADS", torch.get_num_threads()))

Sides = dict[str, Callable[[], object] | None]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


def models(name: str, dtype: torch.dtype):
    """Return open_clip's model and clipfast's, with the same weights."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(name).eval()
    mine = clipfast.create_model(name, weights=theirs.state_dict()).eval()
    return theirs.to(DEVICE, dtype), mine.to(DEVICE, dtype)


def dense(function: Callable[[], object]) -> Callable[[], object]:
    def call():
        with clipfast.exact_shortcuts(False):
            return function()

    return call


def compiled(module: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Return a call of a module that torch.compile froze the weights of."""
    import torch._inductor.config as config

    config.freezing = True
    function = torch.compile(module)
    function(*inputs)
    return partial(function, *inputs)


def openvino(module: torch.nn.Module, images: Tensor, precision: str) -> Callable[[], object] | None:
    if DEVICE != "cpu" or not importlib.util.find_spec("openvino"):
        return None
    sys.modules["openvino_telemetry"] = None  # it reports every conversion to its makers; this makes it do without
    import openvino as ov

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        traced = torch.jit.trace(module.float(), images.float(), check_trace=False)
        converted = ov.convert_model(traced, example_input=images.float(), input=list(images.shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    options = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()
    pixels = images.float().numpy()
    return lambda: torch.from_numpy(request.infer([pixels])[0])


def transformers_tower(state: dict[str, Tensor], config: dict) -> Callable[[Tensor], Tensor] | None:
    if not importlib.util.find_spec("transformers"):
        return None
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from clipfast.models.key_layouts import from_openai, image_tower_of

    vision = config["vision_cfg"]
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=vision["width"],
            intermediate_size=4 * vision["width"],
            num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // 64,
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            projection_dim=config["embed_dim"],
            hidden_act="gelu",
        )
    ).eval()
    tower.load_state_dict(from_openai(image_tower_of(state), "transformers"), strict=False)
    return lambda images: tower(images).image_embeds


def timm_tower(state: dict[str, Tensor], name: str) -> Callable[[Tensor], Tensor] | None:
    if not importlib.util.find_spec("timm"):
        return None
    import timm

    from clipfast.models.key_layouts import from_openai, image_tower_of

    made = {"ViT-B-32": "vit_base_patch32_clip_224", "ViT-B-16": "vit_base_patch16_clip_224"}.get(name)
    if made is None:
        return None
    tower = timm.create_model(made, num_classes=512).eval()
    tower.load_state_dict(from_openai(image_tower_of(state), "timm"), strict=False)
    return tower


def check(sides: Sides, exact: Tensor, least: float) -> dict[str, float]:
    """Return each side's smallest cosine to the exact features; one that is too far off is not timed."""
    cosines = {}
    for name, call in sides.items():
        if call is not None:
            features = call()
            cosines[name] = float(F.cosine_similarity(features.double().cpu(), exact.double().cpu()).min())
            assert cosines[name] >= least, f"{name}: cosine {cosines[name]:.6f} to float64"
    return cosines


LEAST = {torch.float32: 1 - 1e-9, torch.bfloat16: 0.999}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_images(name: str, dtype: torch.dtype, capsys: object) -> None:
    theirs, mine = models(name, dtype)
    images = torch.randn(IMAGES, 3, 224, 224).to(DEVICE, dtype)
    state = {k: v.float() for k, v in mine.state_dict().items()}
    with torch.no_grad(), clipfast.backend("reference"):
        exact = copy.deepcopy(mine).double().encode_image(images.double())
    with torch.inference_mode():
        sides: Sides = {
            "clipfast": partial(mine.encode_image, images),
            "clipfast, dense": dense(partial(mine.encode_image, images)),
            "open_clip": partial(theirs.visual, images),
        }
        precision = "bf16" if dtype == torch.bfloat16 else "f32"
        sides["OpenVINO"] = openvino(copy.deepcopy(theirs.visual), images, precision)
        if dtype == torch.float32:
            for rival, tower in (
                (
                    "transformers",
                    transformers_tower(state, open_clip.get_model_config(name) | {"embed_dim": mine.config.embed_dim}),
                ),
                ("timm", timm_tower(state, name)),
            ):
                sides[rival] = None if tower is None else partial(tower, images)
        with torch.no_grad():
            sides["open_clip, compiled, frozen"] = compiled(theirs.visual, images)
        cosines = check(sides, exact, LEAST[dtype])
        times = paired(sides, ROUNDS)
    report_paired(capsys, f"{name}, {IMAGES} images, {dtype}", times, sides, items=IMAGES, cosines=cosines)


def zero_shot_prompts(count: int) -> list[str]:
    """Return a sample of the 80,000 prompts of ImageNet's classes in OpenAI's templates."""
    prompts = [t(c) for c in open_clip.IMAGENET_CLASSNAMES for t in open_clip.OPENAI_IMAGENET_TEMPLATES]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    return [prompts[i] for i in order[:count]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_zero_shot_prompts(name: str, dtype: torch.dtype, capsys: object) -> None:
    theirs, mine = models(name, dtype)
    tokens = clipfast.tokenize(zero_shot_prompts(PROMPTS)).to(DEVICE)
    with torch.no_grad(), clipfast.backend("reference"), clipfast.exact_shortcuts(False):
        exact = copy.deepcopy(mine).double().encode_text(tokens)
    with torch.inference_mode():
        sides: Sides = {
            "clipfast": partial(mine.encode_text, tokens),
            "clipfast, dense": dense(partial(mine.encode_text, tokens)),
            "open_clip": partial(theirs.encode_text, tokens),
        }
        with torch.no_grad():
            sides["open_clip, compiled, frozen"] = compiled(theirs.encode_text, tokens)
        cosines = check(sides, exact, LEAST[dtype])
        times = paired(sides, ROUNDS)
    average = float((tokens.argmax(dim=-1) + 1).float().mean())
    title = f"{name}, {PROMPTS} ImageNet prompts of {average:.1f} tokens on average, {dtype}"
    report_paired(capsys, title, times, sides, items=PROMPTS, cosines=cosines)


def training_step(model: torch.nn.Module, loss: Callable[..., Tensor], images: Tensor, tokens: Tensor):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss(*model(images, tokens))
        value.backward()
        optimizer.step()
        return value.detach()

    return step


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str, capsys: object) -> None:
    """Float32, captions of 20 tokens; the optimizer's time is in it."""
    theirs, mine = (m.train() for m in models(name, torch.float32))
    torch.manual_seed(1)
    images = torch.randn(IMAGES, 3, 224, 224, device=DEVICE)
    tokens = torch.randint(1, 49000, (IMAGES, 77))
    ends = torch.randint(10, 31, (IMAGES,))
    ends[: IMAGES // 2] = 38 - ends[IMAGES - IMAGES // 2 :]  # 20 tokens on average, the EOS counted
    tokens[torch.arange(77) > ends[:, None]] = 0
    tokens[:, 0], tokens[torch.arange(IMAGES), ends] = 49406, 49407
    tokens = tokens.to(DEVICE)
    steps: Sides = {
        "clipfast": training_step(mine, clipfast.ContrastiveLoss(), images, tokens),
        "clipfast, dense": dense(training_step(copy.deepcopy(mine), clipfast.ContrastiveLoss(), images, tokens)),
        "open_clip": training_step(theirs, open_clip.ClipLoss(), images, tokens),
    }
    first = {side: float(step()) for side, step in steps.items()}
    for side, value in first.items():
        assert abs(value - first["open_clip"]) < 1e-4, f"{side}: loss {value}, open_clip's {first['open_clip']}"
    times = paired(steps, ROUNDS)
    average = float((ends + 1).float().mean())
    title = f"{name}, a training step, {IMAGES} pairs, captions of {average:.1f} tokens on average, float32"
    report_paired(capsys, title, times, steps, items=IMAGES)
