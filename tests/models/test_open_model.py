from __future__ import annotations

import json

import pytest
import small
import torch

from clipfast.models import config
from clipfast.models.config import CLIPConfig
from clipfast.models.create import create_model
from clipfast.models.open_model import find_device, open_model, weights_digest
from clipfast.models.preprocess import PreprocessConfig


def same(model: torch.nn.Module, seed: int = 0) -> bool:
    expected = small.model(seed).state_dict()
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_every_way_to_name_a_model(tmp_path):
    run = small.run(tmp_path / "run")
    model = open_model(run)
    assert same(model)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    other = small.run(tmp_path / "other", seed=1) / "model.safetensors"
    assert same(open_model(run / "model.json", other), seed=1)
    assert same(open_model(run, other), seed=1)
    assert open_model(run, dtype=torch.bfloat16).logit_scale.dtype == torch.bfloat16


def test_a_name_with_weights(tmp_path, monkeypatch):
    monkeypatch.setitem(config._named(), "small", CLIPConfig.from_dict(small.CONFIG))
    weights = tmp_path / "w.pt"
    torch.save(small.model().state_dict(), weights)
    assert same(open_model("small", weights))


@pytest.mark.parametrize(
    ("spec", "weights", "message"),
    [
        ("ViT-B-32", None, "weights: got none for ViT-B-32"),
        ("ViT-B-23", None, "did you mean 'ViT-B-32'"),
        ("no/run", None, "got no/run, expected the folder of a run"),
        ("no.json", "weights.pt", "got no.json, expected a configuration's file"),
        ("config.json", None, "weights: got none for"),
        ("broken.json", "weights.pt", "expected a configuration in JSON"),
        ("list.json", "weights.pt", "list, expected an object"),
        ("weights.pt", None, "weights alone go to --weights"),
        ("config.json", "cut.pt", "corrupt, truncated"),
        ("empty", None, "expected model.json in it"),
        ("half", None, "expected model.safetensors in it"),
    ],
)
def test_mistakes(spec, weights, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(small.CONFIG))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    torch.save(small.model().state_dict(), "weights.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:5000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "model.json").write_text(json.dumps(small.CONFIG))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_model(spec, weights)


def test_a_configurations_file_says_how_pictures_are_read(tmp_path):
    said = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize_mode": "squash"}
    torch.save(small.model().state_dict(), tmp_path / "weights.pt")
    (tmp_path / "open_clip.json").write_text(json.dumps({"model_cfg": small.CONFIG, "preprocess_cfg": said}))
    model = open_model(tmp_path / "open_clip.json", tmp_path / "weights.pt")
    assert model.config == create_model(tmp_path / "open_clip.json").config
    assert model.config.vision_cfg.preprocess_cfg == PreprocessConfig(**said)


def test_devices():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "cuda:x", ""):
        with pytest.raises(ValueError, match=f"device: got '{name}'"):
            find_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="finds no CUDA device"):
            find_device("cuda")


def test_a_digest_sees_every_bit():
    state = {k: v.clone() for k, v in small.model().state_dict().items()}
    digest = weights_digest(state)
    assert digest == weights_digest(dict(reversed(state.items())))
    state["text_projection"][3, 4] += 1e-6
    assert weights_digest(state) != digest
    assert weights_digest({"a": torch.zeros(4)}) != weights_digest({"a": torch.zeros(2, 2)})
    assert weights_digest({"a": torch.zeros(2, dtype=torch.bfloat16)})
