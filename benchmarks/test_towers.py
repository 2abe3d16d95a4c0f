"""Whole towers: images, zero-shot prompts and a training step, dense and with exact shortcuts, beside the rivals.

pytest benchmarks/test_towers.py

Weights are random and shared, so that every side computes the same numbers.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from harness import DEVICE, ON_GPU, absent, by_scale, dense, dtype_name, measure
from torch import Tensor, nn
from towers import DEPTH, compiled, exact_features, in_inference_mode, operations, reference

import clipfast
from clipfast.benchmark.measure import Oracle
from clipfast.benchmark.results import Row
from clipfast.console import counted
from clipfast.evaluate.templates import load_templates
from clipfast.models.key_layouts import from_openai, image_tower_of

SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 128, "layers": 2, "head_width": 64},
    "text_cfg": {"context_length": 77, "width": 128, "heads": 2, "layers": 2},
}
MODELS = by_scale(
    smoke=["small"],
    short=["ViT-B-32"],
    full=["ViT-B-32", "ViT-B-16", "ViT-L-14"],
    gpu=["ViT-B-32", "ViT-B-16", "ViT-L-14"],
)
IMAGES = by_scale(smoke=[1, 2], short=[1, 4, 16], full=[1, 4, 16, 64], gpu=[1, 16, 256])
# float32 takes twice as long on a CPU
IMAGES_FLOAT32 = by_scale(smoke=[1, 2], short=[1, 4], full=[1, 4, 16], gpu=[1, 16, 256])
PROMPTS = by_scale(smoke=4, short=32, full=256, gpu=2048)
PAIRS = by_scale(smoke=2, short=4, full=32, gpu=256)
DTYPES = [torch.bfloat16, torch.float32]

CLASSES = (  # noqa: SIM905
    "tench, goldfish, great white shark, hammerhead shark, rooster, hen, ostrich, house finch, bald eagle, tree "
    "frog, box turtle, green iguana, scorpion, tarantula, peacock, toucan, koala, jellyfish, flamingo, king "
    "penguin, golden retriever, Siberian husky, tiger cat, lion, polar bear, ladybug, monarch butterfly, zebra, "
    "hippopotamus, African bush elephant, acoustic guitar, airliner, ambulance, backpack, barber chair, broom, "
    "cello, coffee mug, computer keyboard, desk, electric fan, fire truck, football helmet, grand piano, hair "
    "dryer, iron, lighthouse, mailbox, mountain bike, parking meter, pirate ship, refrigerator, school bus, space "
    "heater, steam locomotive, teapot, tennis ball, umbrella, washing machine, yurt"
).split(", ")


def create(name: str, dtype: torch.dtype) -> clipfast.CLIP:
    model = clipfast.create_model(SMALL if name == "small" else name).eval()
    return model.to(DEVICE, dtype)


def open_clips(name: str, mine: clipfast.CLIP) -> nn.Module | str:
    """Return open_clip's model with the same weights, or why not."""
    if reason := absent("open_clip", "torchvision"):
        return reason
    import open_clip

    if name == "small":
        config = SMALL | {"vision_cfg": SMALL["vision_cfg"] | {"head_width": 64}}
        theirs = open_clip.CLIP(**config)
    else:
        theirs = open_clip.create_model(name)
    theirs.load_state_dict(mine.state_dict())
    return theirs.eval().to(DEVICE, next(mine.parameters()).dtype)


def transformers_model(mine: clipfast.CLIP) -> nn.Module | str:
    """Return transformers' model with the same weights, or why not."""
    if reason := absent("transformers"):
        return reason
    from transformers import CLIPConfig, CLIPModel

    vision, text = mine.config.vision_cfg, mine.config.text_cfg
    theirs = CLIPModel(
        CLIPConfig(
            projection_dim=mine.config.embed_dim,
            vision_config={
                "hidden_size": vision.width,
                "intermediate_size": 4 * vision.width,
                "num_hidden_layers": vision.layers,
                "num_attention_heads": vision.width // vision.head_width,
                "image_size": vision.image_size,
                "patch_size": vision.patch_size,
                "hidden_act": "gelu",
            },
            text_config={
                "hidden_size": text.width,
                "intermediate_size": 4 * text.width,
                "num_hidden_layers": text.layers,
                "num_attention_heads": text.heads,
                "hidden_act": "gelu",
                "bos_token_id": 49406,
                "eos_token_id": 49407,
                "pad_token_id": 0,
            },
        )
    )
    state = {key: value.float().cpu() for key, value in mine.state_dict().items()}
    theirs.load_state_dict(from_openai(state, "transformers"), strict=False)
    return theirs.eval().to(DEVICE, next(mine.parameters()).dtype)


def transformers_images(theirs: nn.Module | str) -> Callable[[Tensor], Tensor] | str:
    if isinstance(theirs, str):
        return theirs
    return lambda images: theirs.visual_projection(theirs.vision_model(images).pooler_output)


def transformers_texts(theirs: nn.Module | str) -> Callable[[Tensor], Tensor] | str:
    if isinstance(theirs, str):
        return theirs
    return lambda tokens: theirs.text_projection(theirs.text_model(tokens).pooler_output)


def timm_tower(name: str, mine: clipfast.CLIP) -> Callable[[Tensor], Tensor] | str:
    if reason := absent("timm", "torchvision"):
        return reason
    import timm

    made = {
        "ViT-B-32": "vit_base_patch32_clip_224",
        "ViT-B-16": "vit_base_patch16_clip_224",
        "ViT-L-14": "vit_large_patch14_clip_224",
    }.get(name)
    if made is None:
        return "has no such model"
    tower = timm.create_model(made, num_classes=mine.config.embed_dim).eval()
    state = {key: value.float().cpu() for key, value in mine.state_dict().items()}
    tower.load_state_dict(from_openai(image_tower_of(state), "timm"), strict=False)
    return tower.to(DEVICE, next(mine.parameters()).dtype)


def openvino(module: nn.Module | str, images: Tensor) -> Callable[[Tensor], Tensor] | str:
    if reason := absent("openvino"):
        return reason
    if isinstance(module, str) or ON_GPU:
        return "converts open_clip's model, which is absent" if isinstance(module, str) else "has no CUDA"
    sys.modules["openvino_telemetry"] = None  # it reports every conversion to its makers; this makes it do without
    import openvino as ov

    module, pixels = copy.deepcopy(module).float(), images.float()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        traced = torch.jit.trace(module, pixels, check_trace=False)
        converted = ov.convert_model(traced, example_input=pixels, input=list(pixels.shape))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if images.dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = ov.Core().compile_model(converted, "CPU", options).create_infer_request()
    return lambda images: torch.from_numpy(request.infer([images.float().numpy()])[0].copy())


@pytest.mark.parametrize(
    ("count", "dtype"), [(n, torch.bfloat16) for n in IMAGES] + [(n, torch.float32) for n in IMAGES_FLOAT32], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_images(name: str, count: int, dtype: torch.dtype, benchmark: object) -> None:
    mine = create(name, dtype)
    theirs = open_clips(name, mine)
    images = torch.randn(count, 3, 224, 224).to(DEVICE, dtype)
    tower = theirs if isinstance(theirs, str) else theirs.visual
    with torch.no_grad():
        sides = {
            "clipfast": mine.encode_image,
            "clipfast, dense": dense(mine.encode_image),
            "PyTorch": reference(mine.encode_image),
            "open_clip": tower,
            "transformers": transformers_images(transformers_model(mine)),
            "timm": timm_tower(name, mine),
        }
        if (
            count == (IMAGES if dtype == torch.bfloat16 else IMAGES_FLOAT32)[-1]
        ):  # what takes long to build is built once
            sides |= {"OpenVINO": openvino(tower, images), "open_clip, compiled, frozen": compiled(tower)}
    row = Row(
        op="towers",
        name=f"{name}, {counted(count, 'image')}, {dtype_name(dtype)}",
        label=f"{name}, {counted(count, 'image')}, {dtype_name(dtype)}",
        direction="forward",
        dtype=dtype_name(dtype),
        unit="images",
        items=count,
        flops=operations(lambda: mine.encode_image(images)),
        bytes=dtype.itemsize * (images.numel() + sum(p.numel() for p in mine.visual.parameters())),
        series=f"{name}, images, {dtype_name(dtype)}",
        axis="batch",
        at=count,
        law={"time": 1},
    )
    exact = exact_features(lambda model: model.encode_image(images.double()), mine)
    oracle = Oracle([exact], "PyTorch", factor=DEPTH)
    measure(benchmark, row, in_inference_mode(sides), [(images,)], oracle=oracle)


def zero_shot_prompts(count: int) -> list[str]:
    """Return a sample of the classes in OpenAI's seven best templates."""
    prompts = [template.format(name) for name in CLASSES for template in load_templates("simple")]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    return [prompts[i] for i in order[:count]]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", MODELS)
def test_zero_shot_prompts(name: str, dtype: torch.dtype, benchmark: object) -> None:
    mine = create(name, dtype)
    theirs = open_clips(name, mine)
    tokens = clipfast.tokenize(zero_shot_prompts(PROMPTS)).to(DEVICE)
    encode = theirs if isinstance(theirs, str) else theirs.encode_text
    with torch.no_grad():
        sides = {
            "clipfast": mine.encode_text,
            "clipfast, dense": dense(mine.encode_text),
            "PyTorch": reference(mine.encode_text),
            "open_clip": encode,
            "transformers": transformers_texts(transformers_model(mine)),
            "open_clip, compiled, frozen": compiled(encode),
        }
    average = float((tokens.argmax(dim=-1) + 1).float().mean())
    row = Row(
        op="towers",
        name=f"{name}, {PROMPTS} zero-shot prompts of {average:.1f} tokens on average, {dtype_name(dtype)}",
        label=f"{name}, {PROMPTS} prompts, {dtype_name(dtype)}",
        direction="forward",
        dtype=dtype_name(dtype),
        unit="prompts",
        items=PROMPTS,
        flops=operations(lambda: mine.encode_text(tokens)),
        # of the embedding's rows only those of the tokens are read
        bytes=dtype.itemsize * sum(p.numel() for p in mine.transformer.parameters()),
        facts={"average_tokens": average},
    )
    exact = exact_features(lambda model: model.encode_text(tokens), mine)
    oracle = Oracle([exact], "PyTorch", factor=DEPTH)
    measure(benchmark, row, in_inference_mode(sides), [(tokens,)], oracle=oracle)


def training_step(model: nn.Module, loss: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Return an optimizer step; it gives the loss and the gradients' norm."""
    # so small a rate that every round computes the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def step(images: Tensor, tokens: Tensor) -> list[Tensor]:
        optimizer.zero_grad()
        value = loss(*model(images, tokens))
        value.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return [value.detach(), norm]

    return step


def transformers_step(theirs: nn.Module | str) -> Callable[[Tensor, Tensor], list[Tensor]] | str:
    if isinstance(theirs, str):
        return theirs

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = theirs.train()

        def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor]:
            return (self.model(input_ids=tokens, pixel_values=images, return_loss=True).loss,)

    return training_step(Loss(), lambda value: value)


def captions(count: int) -> Tensor:
    """Return tokens of captions that are 20 tokens long on average."""
    tokens = torch.randint(1, 49000, (count, 77))
    ends = torch.randint(10, 31, (count,))
    ends[: count // 2] = 38 - ends[count - count // 2 :]
    tokens[torch.arange(77) > ends[:, None]] = 0
    tokens[:, 0], tokens[torch.arange(count), ends] = 49406, 49407
    return tokens


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str, benchmark: object) -> None:
    """Float32; the optimizer's time and the clipping's are in it."""
    mine = create(name, torch.float32).train()
    theirs = open_clips(name, mine)
    images, tokens = torch.randn(PAIRS, 3, 224, 224, device=DEVICE), captions(PAIRS).to(DEVICE)
    loss = clipfast.ContrastiveLoss()
    exact = copy.deepcopy(mine).double()
    with clipfast.backend("reference"), clipfast.exact_shortcuts(False):
        oracle = [t.clone() for t in training_step(exact, loss)(images.double(), tokens)]
    del exact
    forward = operations(lambda: mine(images, tokens))
    sides = {
        "clipfast": training_step(mine, loss),
        "clipfast, dense": dense(training_step(copy.deepcopy(mine), loss)),
        "PyTorch": reference(training_step(copy.deepcopy(mine), loss)),
    }
    if isinstance(theirs, str):
        sides["open_clip"] = theirs
    else:
        from open_clip.loss import ClipLoss

        sides["open_clip"] = training_step(theirs.train(), lambda image, text, scale: ClipLoss()(image, text, scale))
    sides["transformers"] = transformers_step(transformers_model(mine))
    average = float((tokens.argmax(dim=-1) + 1).float().mean())
    row = Row(
        op="towers",
        name=f"{name}, a training step of {PAIRS} pairs, captions of {average:.1f} tokens on average, float32",
        label=f"{name}, training, {PAIRS} pairs",
        direction="step",
        dtype="float32",
        unit="pairs",
        items=PAIRS,
        flops=3 * forward,
        # weights and two moments read and written, gradients written, read twice, and written clipped
        bytes=4 * 10 * sum(p.numel() for p in mine.parameters()),
    )
    measure(benchmark, row, sides, [(images, tokens)], oracle=Oracle(oracle, "PyTorch", factor=DEPTH), saves=True)
