"""load_weights takes weights of every layout from every kind of file, for whole models and towers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import archives
import open_clip
import pytest
import safetensors.torch
import tiny
import torch
from oracle import relative_error
from rivals import captions
from torch import Tensor, nn

import clipfast
from clipfast.models.key_layouts import from_openai, to_openai
from clipfast.models.weights import load_weights


def features(model: nn.Module) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    return model.encode_image(images), model.encode_text(captions(3, 16, 100))


def saved(save: Callable, state: object, path: Path) -> Path:
    save(state, path)
    return path


def training_checkpoint(model: nn.Module) -> dict:
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    return {
        "epoch": 2,
        "name": "run",
        "state_dict": state,
        "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
    }


# a rival with its weights, and what to give load_weights
RIVALS = {
    "open_clip": tiny.open_clip_clip,
    "open_clip CustomTextCLIP": lambda: tiny.open_clip_clip(custom_text=True),
    "transformers": tiny.transformers_clip,
}
FORMS: dict[str, Callable[[nn.Module, Path], object]] = {
    "state dict": lambda model, folder: model.state_dict(),
    "safetensors": lambda model, folder: saved(
        safetensors.torch.save_file, model.state_dict(), folder / "w.safetensors"
    ),
    "pt": lambda model, folder: saved(torch.save, model.state_dict(), folder / "w.pt"),
    "bin": lambda model, folder: saved(torch.save, model.state_dict(), folder / "w.bin"),
    "str": lambda model, folder: str(saved(torch.save, model.state_dict(), folder / "w.pt")),
    "training checkpoint": lambda model, folder: saved(torch.save, training_checkpoint(model), folder / "epoch_2.pt"),
    "training checkpoint in memory": lambda model, folder: training_checkpoint(model),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rival", RIVALS)
def test_every_whole_model_from_every_form(tmp_path: Path, rival: str, form: str) -> None:
    theirs = RIVALS[rival]()
    source = FORMS[form](theirs, tmp_path)
    model = tiny.clip()
    assert load_weights(model, source) is model
    tiny.assert_same_state(model.state_dict(), to_openai(theirs.state_dict()))
    if rival != "transformers":
        for mine, expected in zip(features(model), features(theirs), strict=True):
            assert relative_error(mine, expected) <= 2e-6


@pytest.mark.parametrize("quick", [False, True])
def test_transformers_folder(tmp_path: Path, quick: bool) -> None:
    theirs = tiny.transformers_clip("quick_gelu" if quick else "gelu")
    folder = tmp_path / "clip"
    theirs.save_pretrained(folder)
    model = clipfast.create_model(tiny.QUICK_CONFIG if quick else tiny.CONFIG, weights=folder)
    tiny.assert_same_state(model.state_dict(), to_openai(theirs.state_dict()))


@pytest.mark.parametrize("save", [archives.save_scripted, archives.save_traced])
def test_torchscript_archives(tmp_path: Path, save: Callable) -> None:
    theirs = tiny.open_clip_clip(quick_gelu=True)
    expected = tiny.cloned(theirs.state_dict())
    save(theirs, tmp_path / "ViT-B-32.pt")
    model = load_weights(tiny.clip(tiny.QUICK_CONFIG), tmp_path / "ViT-B-32.pt")
    tiny.assert_same_state(model.state_dict(), expected)
    for mine, theirs_ in zip(features(model), features(theirs), strict=True):
        assert relative_error(mine, theirs_) <= 2e-6


def test_half_precision_archive_is_widened_exactly(tmp_path: Path) -> None:
    theirs = tiny.open_clip_clip(quick_gelu=True)
    open_clip.model.convert_weights_to_fp16(theirs)
    assert {v.dtype for v in theirs.state_dict().values()} == {torch.float16, torch.float32}
    model = load_weights(tiny.clip(tiny.QUICK_CONFIG), archives.save_scripted(theirs, tmp_path / "ViT-B-32.pt"))
    tiny.assert_same_state(model.state_dict(), {k: v.float() for k, v in theirs.state_dict().items()})


def test_resnets(tmp_path: Path) -> None:
    theirs = tiny.open_clip_clip(resnet=True, quick_gelu=True)
    config = tiny.RESNET_CONFIG | {"approximate": "quick"}
    model = load_weights(tiny.clip(config), archives.save_scripted(theirs, tmp_path / "RN50.pt"))
    tiny.assert_same_state(model.state_dict(), theirs.state_dict())
    # BatchNorm's counters came later than some checkpoints
    without = {k: v for k, v in theirs.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert len(without) < len(theirs.state_dict())
    tiny.assert_same_state(load_weights(tiny.clip(config), without).state_dict(), theirs.state_dict())


TOWERS = {
    "ViT of open_clip": (tiny.vit, tiny.open_clip_clip, "visual."),
    "ViT of its own": (tiny.vit, lambda: tiny.open_clip_clip().visual, "visual."),
    "ViT of transformers": (tiny.vit, tiny.transformers_clip, "visual."),
    "ViT of transformers vision": (
        lambda: tiny.vit(output_dim=None),
        lambda: tiny.transformers_vision(projection=False),
        "visual.",
    ),
    "ViT of transformers vision with projection": (
        tiny.vit,
        lambda: tiny.transformers_vision(projection=True),
        "visual.",
    ),
    "ViT of timm": (tiny.vit, tiny.timm_vit, "visual."),
    "ViT of timm without head": (lambda: tiny.vit(output_dim=None), lambda: tiny.timm_vit(0), "visual."),
    "ResNet of open_clip": (
        lambda: clipfast.ModifiedResNet((1, 1, 1, 1), 32, 4, 32, 8),
        lambda: tiny.open_clip_clip(resnet=True),
        "visual.",
    ),
    "text of open_clip": (tiny.text_transformer, tiny.open_clip_clip, ""),
    "text of CustomTextCLIP": (tiny.text_transformer, lambda: tiny.open_clip_clip(custom_text=True), ""),
    "text of its own": (tiny.text_transformer, lambda: tiny.open_clip_clip(custom_text=True).text, ""),
    "text of transformers": (tiny.text_transformer, tiny.transformers_clip, ""),
    "text of transformers text": (
        lambda: tiny.text_transformer(output_dim=None),
        lambda: tiny.transformers_text(projection=False),
        "",
    ),
    "text of transformers text, projected": (
        tiny.text_transformer,
        lambda: tiny.transformers_text(projection=True),
        "",
    ),
}


@pytest.mark.parametrize("case", TOWERS)
def test_towers_take_their_share(case: str) -> None:
    make, rival, prefix = TOWERS[case]
    state = rival().state_dict()
    tower = load_weights(make(), state)
    expected = to_openai(state)
    tiny.assert_same_state(tower.state_dict(), {k: expected[prefix + k] for k in tower.state_dict()})


def test_towers_of_an_archive(tmp_path: Path) -> None:
    theirs = tiny.open_clip_clip(quick_gelu=True)
    path = archives.save_scripted(theirs, tmp_path / "ViT-B-32.pt")
    images, tokens = torch.randn(2, 3, 32, 32), captions(2, 16, 100)
    vit = load_weights(tiny.vit(approximate="quick"), path)
    assert relative_error(vit(images), theirs.encode_image(images)) <= 2e-6
    text = load_weights(tiny.text_transformer(approximate="quick"), path)
    assert relative_error(text(tokens), theirs.encode_text(tokens)) <= 2e-6


@pytest.mark.parametrize("layout", ["openai", "transformers"])
@pytest.mark.parametrize("model_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_converted_to_the_dtype_of_the_model(
    layout: str, model_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    state = {k: v.to(file_dtype) for k, v in tiny.open_clip_clip().state_dict().items()}
    model = tiny.clip(dtype=model_dtype)
    load_weights(model, from_openai(state, layout))
    tiny.assert_same_state(model.state_dict(), {k: v.to(model_dtype) for k, v in state.items()})


def test_parameters_stay_themselves() -> None:
    model = tiny.clip()
    model.visual.requires_grad_(False)
    before = dict(model.named_parameters())
    flags = {k: p.requires_grad for k, p in before.items()}
    load_weights(model, tiny.open_clip_clip().state_dict())
    after = dict(model.named_parameters())
    assert all(after[k] is p for k, p in before.items())
    assert {k: p.requires_grad for k, p in after.items()} == flags
    assert all(p.is_leaf and p.grad is None for p in after.values())


def test_what_came_is_left_as_it_was() -> None:
    state = tiny.open_clip_clip().state_dict()
    before = tiny.cloned(state)
    model = load_weights(tiny.vit(image_size=64), state, interpolate_image_positions=True)
    nn.init.zeros_(model.ln_post.weight)
    tiny.assert_same_state(state, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("image_size", "patch_size"), [((64, 64), 16), ((48, 80), 16), ((16, 16), 16)])
def test_interpolated_positions_are_those_of_open_clip(
    dtype: torch.dtype, image_size: tuple[int, int], patch_size: int
) -> None:
    state = tiny.open_clip_clip().to(dtype).state_dict()
    larger = tiny.CONFIG | {"vision_cfg": tiny.CONFIG["vision_cfg"] | {"image_size": image_size}}
    resized = dict(state)
    open_clip.model.resize_pos_embed(resized, open_clip.CLIP(**larger))
    expected = resized["visual.positional_embedding"]
    assert expected.shape != state["visual.positional_embedding"].shape
    for source in (state, from_openai(state, "transformers")):
        model = clipfast.create_model(larger, dtype=dtype)
        with pytest.raises(ValueError, match=r"misshapen: visual\.positional_embedding"):
            load_weights(model, source)
        load_weights(model, source, interpolate_image_positions=True)
        assert torch.equal(model.visual.positional_embedding, expected)
    vit = tiny.vit(image_size=image_size).to(dtype)
    load_weights(vit, state, interpolate_image_positions=True)
    assert torch.equal(vit.positional_embedding, expected)


def test_positions_that_fit_are_not_touched() -> None:
    # 2 × 8 patches are as many as 4 × 4: a grid of its own must not be taken for a square one
    rival = tiny.vit(image_size=(32, 128))
    vit = load_weights(tiny.vit(image_size=(32, 128)), rival.state_dict(), interpolate_image_positions=True)
    tiny.assert_same_state(vit.state_dict(), rival.state_dict())
