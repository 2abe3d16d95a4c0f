from __future__ import annotations

import pytest
import torch

import clipfast
from clipfast.train.checkpoint import load_checkpoint, save_checkpoint
from clipfast.train.optimizer import make_optimizer

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def saved(tmp_path):
    model = clipfast.create_model(TINY)
    optimizer = make_optimizer(model, 0.1, 0.1)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    path = tmp_path / "runs" / "checkpoint.pt"
    save_checkpoint(path, model, step=7, optimizer=optimizer)
    return path, model, optimizer


def test_round_trip_is_bitwise(saved):
    path, model, optimizer = saved
    checkpoint = load_checkpoint(path)
    assert checkpoint.step == 7
    again = clipfast.create_model(checkpoint.config)
    again.load_state_dict(checkpoint.model)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = make_optimizer(again, 0.5, 0.0)
    other.load_state_dict(checkpoint.optimizer)
    assert other.param_groups[0]["lr"] == 0.1
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"])


def test_load_weights_reads_it(saved):
    path, model, _ = saved
    again = clipfast.create_model(TINY, weights=path)
    assert torch.equal(again.visual.proj, model.visual.proj)


def test_a_failed_save_leaves_the_old_one(saved, monkeypatch):
    path, model, _ = saved
    whole = path.read_bytes()

    def fail_half_way(content: object, file: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail_half_way)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, model, step=8)
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_damaged_files_are_named(saved):
    path, _, _ = saved
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: corrupt, truncated"):
            load_checkpoint(path)


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_code_is_never_run(tmp_path, capsys):
    torch.save({"format": "clipfast.checkpoint.1", "model": Code()}, tmp_path / "code.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_checkpoint(tmp_path / "code.pt")
    assert "ran" not in capsys.readouterr().out


def test_other_files_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="expected a file that clipfast saved"):
        load_checkpoint(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "missing.pt")
