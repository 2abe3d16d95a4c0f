"""``clipfast convert`` writes what convert_weights writes, and tells mistakes in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import archives
import numpy as np
import pytest
import tiny
import tiny_siglip
import torch
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.models.checkpoint_files import read_state_dict
from clipfast.models.key_layouts import to_openai


def convert(*arguments: object):
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_there_and_back(tmp_path: Path, suffix: str) -> None:
    state = tiny.open_clip_clip().state_dict()
    first, there, back = (tmp_path / f"{name}{suffix}" for name in ("first", "new/there", "back"))
    torch.save(state, tmp_path / "source.pt")
    assert convert(tmp_path / "source.pt", first, "--layout", "openai").exit_code == 0
    result = convert(first, there, "--layout", "transformers")
    assert result.exit_code == 0
    assert result.stdout == f"wrote {there} in the layout of transformers\n"
    assert "vision_model.pre_layrnorm.weight" in read_state_dict(there)
    assert convert(there, back, "--layout", "openai").exit_code == 0
    tiny.assert_same_state(read_state_dict(back), state)


def test_big_vision_there_and_back(tmp_path: Path) -> None:
    state = tiny_siglip.drawn(clipfast.create_model(tiny_siglip.SIGLIP)).float().state_dict()
    torch.save(state, tmp_path / "w.pt")
    told = ("--layout", "big_vision", "--naflex", "--heads", "2", "2")
    result = convert(tmp_path / "w.pt", tmp_path / "w.npz", *told)
    assert (result.exit_code, result.stdout) == (0, f"wrote {tmp_path / 'w.npz'} in the layout of big_vision\n")
    with np.load(tmp_path / "w.npz") as arrays:
        assert arrays["params/img/pos_embedding"].shape == (3, 3, 64)
    # heads and NaFlex are the source's from here on
    for target, layout in (("hf.safetensors", "transformers"), ("again.npz", "big_vision"), ("back.pt", "openai")):
        assert convert(tmp_path / "w.npz", tmp_path / target, "--layout", layout).exit_code == 0
    assert read_state_dict(tmp_path / "hf.safetensors")["vision_model.embeddings.patch_embedding.weight"].dim() == 2
    tiny.assert_same_state(read_state_dict(tmp_path / "again.npz"), read_state_dict(tmp_path / "w.npz"))
    tiny.assert_same_state(read_state_dict(tmp_path / "back.pt"), state)


def test_archives_and_folders(tmp_path: Path) -> None:
    archive = archives.save_scripted(tiny.open_clip_clip(quick_gelu=True), tmp_path / "ViT-B-32.pt")
    assert convert(archive, tmp_path / "tower.safetensors", "--layout", "timm").exit_code == 0
    tiny.timm_vit().load_state_dict(read_state_dict(tmp_path / "tower.safetensors"), strict=True)
    rival = tiny.transformers_clip()
    rival.save_pretrained(tmp_path / "folder")
    assert convert(tmp_path / "folder", tmp_path / "w.pt", "--layout", "openai").exit_code == 0
    tiny.assert_same_state(read_state_dict(tmp_path / "w.pt"), to_openai(rival.state_dict()))


@pytest.mark.parametrize(
    ("source", "target", "layout", "message"),
    [
        (
            "w.pt",
            "out.pt",
            "keras",
            "layout: got 'keras', expected one of 'openai', 'open_clip', 'transformers', 'timm', 'big_vision'",
        ),
        ("w.pt", "out.npz", "timm", "for layout 'timm', expected .safetensors, .pt or .bin"),
        ("missing.pt", "out.pt", "openai", "missing.pt: there is no such file of weights"),
        ("", "out.pt", "openai", "got a folder without weights"),
        ("text.pt", "out.pt", "openai", "text.pt: corrupt, truncated, or no file of weights"),
        ("other.pt", "out.pt", "openai", "got keys of no known layout (weight, bias)"),
        ("malice.pt", "out.pt", "openai", "code in a file is never run"),
        ("w.pt", "text.pt/out.pt", "openai", "text.pt"),
        ("w.pt", "folder.pt", "openai", "folder.pt"),
        ("w.pt", "out.pt", "big_vision", "for layout 'big_vision', expected .npz"),
        ("w.pt", "out.npz", "big_vision", "got keys that it has no place for: "),
        ("pickled.npz", "out.pt", "openai", "pickled.npz: got pickled objects, expected numbers"),
        ("cut.npz", "out.pt", "openai", "cut.npz: corrupt or truncated, expected an .npz of arrays"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, source: str, target: str, layout: str, message: str) -> None:
    torch.save(tiny.open_clip_clip().state_dict(), tmp_path / "w.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    torch.save({"a": archives.Malice(tmp_path / "was_run")}, tmp_path / "malice.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "pickled.npz", a=np.array([archives.Malice(tmp_path / "was_run"), None], dtype=object))
    (tmp_path / "folder.pt").mkdir()
    before = sorted(tmp_path.rglob("*"))
    result = convert(tmp_path / source, tmp_path / target, "--layout", layout)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert not result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_layout_must_be_given(tmp_path: Path) -> None:
    result = convert(tmp_path / "w.pt", tmp_path / "out.pt")
    assert result.exit_code == 2
    assert "--layout" in result.stderr


def test_from_a_shell(tmp_path: Path) -> None:
    torch.save(tiny.open_clip_clip().state_dict(), tmp_path / "w.pt")
    command = [sys.executable, "-c", "from clipfast.cli import app; app()", "convert"]
    done = subprocess.run([*command, "w.pt", "out.safetensors", "--layout", "timm"], cwd=tmp_path, check=False)
    assert done.returncode == 0
    done = subprocess.run(
        [*command, "no.pt", "out.pt", "--layout", "timm"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no.pt: there is no such file of weights (nothing is downloaded)\n"
