"""convert_weights writes files that the rivals read, and a way there and back is bitwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import archives
import pytest
import safetensors.torch
import tiny
import tiny_siglip
import torch
import transformers
from torch import Tensor

import clipfast
from clipfast.models.checkpoint_files import read_state_dict
from clipfast.models.key_layouts import to_openai
from clipfast.models.weights import convert_weights


def tiny_state() -> dict[str, Tensor]:
    return tiny.open_clip_clip().state_dict()


def with_an_unknown_key() -> dict[str, Tensor]:
    return tiny_state() | {"extra": torch.ones(1)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_convert_there_and_back_is_bitwise(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    state = tiny.cloned(tiny.open_clip_clip().to(dtype).state_dict())
    torch.save(state, tmp_path / "first.pt")
    convert_weights(tmp_path / "first.pt", tmp_path / f"there{suffix}", "transformers")
    rival = tiny.transformers_clip().to(dtype)
    rival.load_state_dict(read_state_dict(tmp_path / f"there{suffix}"), strict=True)
    convert_weights(tmp_path / f"there{suffix}", tmp_path / f"back{suffix}", "openai")
    tiny.assert_same_state(read_state_dict(tmp_path / f"back{suffix}"), state)
    convert_weights(state, tmp_path / f"tower{suffix}", "timm")
    tiny.timm_vit().to(dtype).load_state_dict(read_state_dict(tmp_path / f"tower{suffix}"), strict=True)
    convert_weights(tmp_path / f"tower{suffix}", tmp_path / f"tower back{suffix}", "openai")
    image = {k: v for k, v in state.items() if k.startswith("visual.")}
    tiny.assert_same_state(read_state_dict(tmp_path / f"tower back{suffix}"), image)


def test_convert_an_archive_for_open_clip(tmp_path: Path) -> None:
    theirs = tiny.open_clip_clip(quick_gelu=True)
    convert_weights(archives.save_scripted(theirs, tmp_path / "ViT-B-32.pt"), tmp_path / "w.safetensors", "openai")
    rival = tiny.open_clip_clip(quick_gelu=True, init_logit_scale=1.0)
    rival.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"), strict=True)
    tiny.assert_same_state(rival.state_dict(), theirs.state_dict())


def test_transformers_reads_a_converted_folder(tmp_path: Path) -> None:
    theirs = tiny.transformers_clip()
    folder = tmp_path
    theirs.save_pretrained(folder)
    changed = {k: v + 1 for k, v in to_openai(theirs.state_dict()).items()}
    convert_weights(changed, folder / "model.safetensors", "transformers")
    read = transformers.CLIPModel.from_pretrained(folder)
    tiny.assert_same_state(to_openai(read.state_dict()), changed)


@pytest.mark.parametrize(
    ("source", "target", "layout", "message"),
    [
        (tiny_state, "w.safetensors", "keras", "layout: got 'keras', expected one of 'openai'"),
        (tiny_state, "w.npy", "timm", r"path: got '.*w\.npy', expected a name that ends"),
        (tiny_state, "w.npz", "timm", r"path: got '.*w\.npz' for layout 'timm', expected \.safetensors, \.pt or \.bin"),
        (tiny_state, "w.pt", "big_vision", r"path: got '.*w\.pt' for layout 'big_vision', expected \.npz"),
        (lambda: tiny.transformers_text(projection=True).state_dict(), "w.pt", "timm", "without an image tower"),
        (lambda: tiny.open_clip_clip(resnet=True).state_dict(), "w.pt", "timm", r"no place for: .*visual\.conv2"),
        (with_an_unknown_key, "w.pt", "openai", "no place for: extra"),
        (with_an_unknown_key, "w.pt", "transformers", "no place for: extra"),
        (with_an_unknown_key, "w.pt", "timm", "no place for: extra"),
    ],
)
def test_conversions_that_are_refused_write_nothing(
    tmp_path: Path, source: Callable, target: str, layout: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_weights(source(), tmp_path / target, layout)
    assert not list(tmp_path.iterdir())


def test_the_target_is_checked_before_the_source_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layout"):
        convert_weights(tmp_path / "not there", tmp_path / "w.pt", "keras")
    with pytest.raises(ValueError, match="path"):
        convert_weights(tmp_path / "not there", tmp_path / "w.npz", "timm")
    with pytest.raises(FileNotFoundError, match="not there"):
        convert_weights(tmp_path / "not there", tmp_path / "w.pt", "timm")


@pytest.mark.parametrize(
    ("config", "layout", "lacked"),
    [
        (tiny_siglip.CLIPA, "transformers", "visual.ln_pre.weight"),
        (
            tiny.CONFIG | {"text_cfg": tiny.CONFIG["text_cfg"] | {"qkv_bias": False}},
            "transformers",
            "attn.in_proj_bias",
        ),
        (
            tiny_siglip.SIGLIP | {"vision_cfg": tiny_siglip.VISION | {"qkv_bias": False}},
            "big_vision",
            "visual.transformer.resblocks.0.attn.in_proj_bias",
        ),
    ],
    ids=["no first norm", "no bias of text", "no bias of images"],
)
def test_what_a_library_would_begin_anew_is_refused(config, layout, lacked, tmp_path):
    """Its classes would load such a file with a warning at best, and compute something else."""
    state = clipfast.create_model(config).state_dict()
    target, heads = ("written.npz", (2, 2)) if layout == "big_vision" else ("written.pt", None)
    with pytest.raises(ValueError, match=rf"layout '{layout}': got no .*{lacked}.*, expected what its models always"):
        convert_weights(state, tmp_path / target, layout, heads=heads)
    assert not list(tmp_path.iterdir())
