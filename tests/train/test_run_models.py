"""Runs that begin with another library's model: its folder's configuration, pictures, tokenizer and weights."""

from __future__ import annotations

import io
import json

import pytest
import siglip_folders
import small
import torch
from PIL import Image
from rich.console import Console

import clipfast
from clipfast.models.foreign_config import config_of
from clipfast.train.config import make_run_config
from clipfast.train.run_models import make_teacher
from clipfast.train.start import train


def test_a_run_begins_with_another_librarys_folder(tmp_path):
    model, ids_of, read = siglip_folders.siglip(tmp_path / "siglip")
    pictures = small.write_pictures(tmp_path / "pictures", 4)
    quiet = Console(file=io.StringIO())
    settings = {
        "data": str(tmp_path / "pictures"), "val_data": str(tmp_path / "pictures"), "model": str(tmp_path / "siglip"),
        "weights": str(tmp_path / "siglip"), "output": str(tmp_path / "run"), "steps": 1, "batch_size": 4,
        "learning_rate": 1e-12, "warmup_steps": 1, "workers": 0, "device": "cpu", "tensorboard": False,
    }  # fmt: skip
    found = train(settings, console=quiet)
    pixels = read([Image.open(path).convert("RGB") for path in pictures])
    texts = [path.with_suffix(".txt").read_text() for path in pictures]
    with torch.no_grad():
        expected = model(ids_of(texts), **pixels, return_loss=True).loss
    assert found.metrics["val_loss"] == pytest.approx(float(expected), rel=1e-5)
    # what a run leaves is enough for the next one
    assert config_of(tmp_path / "run") == config_of(tmp_path / "siglip")
    left = str(tmp_path / "run")
    again = train(
        settings | {"model": left, "weights": left, "output": str(tmp_path / "again")},
        console=Console(file=io.StringIO()),
    )
    assert again.metrics["val_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_a_teacher_has_to_know_such_pictures(tmp_path):
    """One that was trained with other numbers would be shown pictures that it has never seen the like of."""
    own, weights = tmp_path / "own.json", tmp_path / "weights.pt"
    own.write_text(json.dumps(small.CONFIG))
    torch.save(small.model().state_dict(), weights)
    for name, value, refused in (("mean", [0.5] * 3, True), ("std", [0.5] * 3, True), ("resize_mode", "squash", False)):
        values = {name: value}
        (tmp_path / "teacher.json").write_text(json.dumps(small.CONFIG | {"preprocess_cfg": values}))
        run_config = make_run_config(
            {
                "data": "none", "steps": 1, "model": str(own),
                "distill_model": str(tmp_path / "teacher.json"), "distill_weights": str(weights),
            }
        )  # fmt: skip
        if not refused:
            assert isinstance(make_teacher(run_config, config_of(own)), clipfast.CLIP)
        else:
            with pytest.raises(ValueError, match=rf"distill_model: got {name} \(0.5, 0.5, 0.5\), expected \(0\.\d+"):
                make_teacher(run_config, config_of(own))
