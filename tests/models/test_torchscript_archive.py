"""TorchScript archives are read without running, or even compiling, the code that they hold."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import archives
import pytest
import tiny
import torch

from clipfast.models.checkpoint_files import read_state_dict


@pytest.mark.parametrize("save", [archives.save_scripted, archives.save_traced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_tensors_are_those_that_torch_reads(
    tmp_path: Path, save: Callable, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = tiny.open_clip_clip(quick_gelu=True)
    # OpenAI's archives keep norms in float32
    clip.visual.to(dtype).ln_pre.float()
    if save is archives.save_traced:
        clip.to(dtype)
    path = save(clip, tmp_path / "ViT-B-32.pt")
    expected = archives.loaded_by_torch(path)
    monkeypatch.setattr(torch.jit, "load", None)
    read = read_state_dict(path)
    tiny.assert_same_state(read, expected)
    assert clip.state_dict().keys() <= read.keys()
    assert ("vocab_size" in read) == (save is archives.save_scripted)


def test_code_in_an_archive_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    path = tmp_path / "ViT-B-32.pt"
    archives.save_scripted(tiny.open_clip_clip(), path)
    archives.plant_in_archive(path, "harmless")
    assert "visual.proj" in read_state_dict(path)
    archives.plant_in_archive(path, archives.Malice(trace))
    with pytest.raises(ValueError, match=r"refers to (posix|os)\.system, .* code in a file is never run"):
        read_state_dict(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "call",
    [
        b"cbuiltins\neval\n",
        b"ctorch\nload\n",
        b"ctorch.jit\nload\n",
        b"ccollections\nOrderedDict.__init__\n",
        b"c__torch\nsystem\n",
        b"\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93",
    ],
)
def test_archives_know_no_other_names(tmp_path: Path, call: bytes) -> None:
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w/constants.pkl", b"\x80\x02).")
        archive.writestr("w/data.pkl", b"\x80\x04" + call + b".")
    with pytest.raises(ValueError, match="refers to .* never run"):
        read_state_dict(path)


def test_an_archive_cannot_change_how_later_ones_are_read(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.pt", tmp_path / "bad.pt"
    archives.save_scripted(tiny.open_clip_clip(), good)
    expected = archives.loaded_by_torch(good)
    for name in (b"torch\nFloatStorage\n", b"__torch__\nModel\n", b"torch._utils\n_rebuild_tensor_v2\n"):
        with zipfile.ZipFile(bad, "w") as archive:
            archive.writestr("w/constants.pkl", b"\x80\x02).")
            # BUILD with a state of attributes, on what the name stands for
            archive.writestr("w/data.pkl", b"\x80\x02c" + name + b"}X\x05\x00\x00\x00dtypeK\x01sb.")
        with pytest.raises(ValueError, match=r"bad\.pt: "):
            read_state_dict(bad)
        tiny.assert_same_state(read_state_dict(good), expected)


def test_an_archive_without_tensors(tmp_path: Path) -> None:
    archives.save_scripted_without_tensors(tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt: got no entries, expected a state dict"):
        read_state_dict(tmp_path / "w.pt")
