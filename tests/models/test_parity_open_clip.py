"""clipfast.CLIP computes what open_clip computes: outputs, gradients, and training."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from oracle import assert_as_exact_as_reference, relative_error
from rivals import captions
from torch import Tensor, nn

import clipfast

# widths and heads of the named models with few layers: all layers in fp64 take up to 32 GB, and minutes
FEW_LAYERS = {"ViT": {"vision_cfg": {"layers": 2}, "text_cfg": {"layers": 2}}}
FEW_LAYERS["RN"] = {"vision_cfg": {"layers": [1, 2, 1, 1]}, "text_cfg": {"layers": 3}}
SMALL = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 200, "width": 48, "heads": 3, "layers": 3},
}


def rival_config(name: str, few_layers: bool = False) -> dict:
    config = open_clip.get_model_config(name)
    if few_layers:
        changes = FEW_LAYERS["RN" if name.startswith("RN") else "ViT"]
        config = {**config, **{part: config[part] | change for part, change in changes.items()}}
    return config


def rival_model(config: dict) -> nn.Module:
    model = open_clip.CLIP(**config)
    for key, parameter in model.named_parameters():
        if key.endswith("bn3.weight"):
            # they start at zero, which would hide the residual branches
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def step(model: nn.Module, loss: nn.Module, images: Tensor, tokens: Tensor) -> tuple[dict, dict]:
    """Return the named outputs and the named gradients of one training step."""
    model.zero_grad()
    image_features, text_features, scale = model(images, tokens)
    value = loss(image_features, text_features, scale)
    value.backward()
    outputs = {"image": image_features, "text": text_features, "scale": scale, "loss": value}
    gradients = {k: p.grad for k, p in model.named_parameters()}
    # a key bias moves all scores of a query alike: its gradient is zero, so it is read together with its siblings
    if "visual.attnpool.k_proj.bias" in gradients:
        parts = [gradients.pop(f"visual.attnpool.{p}_proj.bias") for p in "qkv"]
        gradients["visual.attnpool.qkv_bias"] = torch.cat(parts)
    return {k: v.detach() for k, v in outputs.items()}, gradients


def worst_error(actual: dict, expected: dict) -> tuple[float, str]:
    assert actual.keys() == expected.keys()
    return max((relative_error(actual[k], expected[k]), k) for k in expected)


@pytest.mark.parametrize(
    ("name", "few_layers"),
    [
        ("ViT-B-32-quickgelu", True),
        ("ViT-B-16", True),
        ("ViT-L-14", True),
        ("ViT-H-14", True),
        ("RN50x4", True),
        *(pytest.param(name, False, marks=pytest.mark.exhaustive) for name in ("ViT-B-16", "ViT-L-14", "RN50x4")),
    ],
)
def test_same_outputs_and_gradients(name: str, few_layers: bool) -> None:
    torch.manual_seed(0)
    config = rival_config(name, few_layers)
    size = config["vision_cfg"]["image_size"]
    # BatchNorm's statistics want more than two pictures
    count = 2 if few_layers and not name.startswith("RN") else 3
    images, tokens = torch.randn(count, 3, size, size, dtype=torch.float64), captions(count)
    rival = rival_model(config).double()
    weights = {k: v.clone() for k, v in rival.state_dict().items()}
    outputs, gradients = step(rival, open_clip.ClipLoss(), images, tokens)
    # BatchNorm's running statistics have moved: the fp32 comparison starts from the same weights again
    rival.load_state_dict(weights)
    rival.zero_grad()  # or float() would convert the gradients that were just taken
    with torch.no_grad():
        fp32_outputs = dict(enumerate(rival.float()(images.float(), tokens)))
    del rival

    model = clipfast.create_model(config, weights=weights, dtype=torch.float64)
    my_outputs, my_gradients = step(model, clipfast.ContrastiveLoss(), images, tokens)
    worst = worst_error(my_outputs, outputs)
    assert worst[0] <= 1e-10, worst
    worst = worst_error(my_gradients, gradients)
    assert worst[0] <= 1e-10, worst

    clipfast.load_weights(model, weights).zero_grad()
    with torch.no_grad():
        my_fp32_outputs = dict(enumerate(model.float()(images.float(), tokens)))
    worst = worst_error(my_fp32_outputs, fp32_outputs)
    assert worst[0] <= 2e-6, worst


# Behind twelve blocks two ways of rounding differ by what three images make of it: clipfast's reference, which is
# plain PyTorch, is beyond the bound with some batches too. Of two batches either side's largest error counts.
@pytest.mark.parametrize(("name", "batches"), [("ViT-B-32", 2), ("RN50", 1)])
@pytest.mark.slow
def test_all_layers(name: str, batches: int) -> None:
    """As above with every layer, and gradients in fp32 that are as exact as the rival's: one oracle serves both."""
    torch.manual_seed(0)
    config = rival_config(name)
    rival = rival_model(config)
    # read before the training step, which moves BatchNorm's statistics
    model, double = (
        clipfast.create_model(config, weights=rival.state_dict(), dtype=dtype) for dtype in (None, torch.float64)
    )
    oracle = copy.deepcopy(rival).double()
    found: list[tuple[dict, dict, dict]] = []
    natural = 0.0
    for batch in range(batches):
        images, tokens = torch.randn(3, 3, 224, 224), captions(3)
        outputs, exact = step(oracle, open_clip.ClipLoss(), images.double(), tokens)
        if batch == 0:
            for mine, expected in zip(
                step(double, clipfast.ContrastiveLoss(), images.double(), tokens), (outputs, exact), strict=True
            ):
                worst = worst_error(mine, expected)
                assert worst[0] <= 1e-10, worst
            del double, mine
        their_outputs, theirs = step(rival, open_clip.ClipLoss(), images, tokens)
        my_outputs, mine = step(model, clipfast.ContrastiveLoss(), images, tokens)
        worst = worst_error(my_outputs, their_outputs)
        assert worst[0] <= 2e-6, worst
        found.append((mine, theirs, exact))
        # a scalar's scale is that of the sum behind it, Σ G∘S, whose terms cancel where fresh features are all alike
        logits = outputs["scale"] * outputs["image"] @ outputs["text"].T
        of_logits = (logits.softmax(0) + logits.softmax(1)) / 2 - torch.eye(len(logits))
        natural = max(natural, float((of_logits * logits).abs().mean(0).sum()))
    for key in found[0][2]:
        scale = natural if key == "logit_scale" else None
        both = (torch.stack([gradients[key] for gradients in side]) for side in zip(*found, strict=True))
        assert_as_exact_as_reference(*both, key, scale)
