"""Weights are found in what training and libraries put around them, and code in it is never run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import archives
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor, nn

import clipfast
from clipfast.models.checkpoint_files import read_state_dict
from clipfast.models.key_layouts import to_openai
from clipfast.models.weights import load_weights

RIVALS = {
    "open_clip": tiny.open_clip_clip,
    "custom": lambda: tiny.open_clip_clip(custom_text=True),
    "transformers": tiny.transformers_clip,
    "timm": tiny.timm_vit,
    "image tower": lambda: tiny.open_clip_clip().visual,
    "text tower": lambda: tiny.transformers_text(projection=True),
    "ResNet": lambda: tiny.open_clip_clip(resnet=True),
}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


PREFIXES = (
    "model.",
    "module.model.",
    "model._orig_mod.",
    "_orig_mod.module.model.",
    "_forward_module.model.",
    "clip.",
    "net.",
)


@pytest.mark.parametrize("rival", RIVALS)
def test_prefixes_in_any_order(rival: str) -> None:
    state = RIVALS[rival]().state_dict()
    expected = to_openai(state)
    for prefix in PREFIXES:
        tiny.assert_same_state(to_openai(prefixed(state, prefix)), expected)


def test_wrapped_parts_of_a_model() -> None:
    model = tiny.open_clip_clip()
    expected = tiny.cloned(model.state_dict())
    for part in (model.visual, model.transformer.resblocks[1], model.ln_final):
        part.compile()  # in place: keys stay
    model.visual = torch.compile(model.visual)
    model.transformer.resblocks[0] = torch.compile(model.transformer.resblocks[0])
    assert "visual._orig_mod.conv1.weight" in model.state_dict()
    tiny.assert_same_state(to_openai(model.state_dict()), expected)
    sharded = {k.replace("resblocks.1.", "resblocks.1._fsdp_wrapped_module."): v for k, v in expected.items()}
    tiny.assert_same_state(to_openai(sharded), expected)
    parallel = {k.replace("visual.", "visual.module."): v for k, v in expected.items()}
    tiny.assert_same_state(to_openai(parallel), expected)


@pytest.mark.parametrize("around", [lambda m: m, torch.compile, nn.DataParallel], ids=["plain", "compile", "parallel"])
def test_averaged_models(around: Callable) -> None:
    model = tiny.open_clip_clip()
    averaged = torch.optim.swa_utils.AveragedModel(around(model))
    averaged.update_parameters(around(model))
    state = averaged.state_dict()
    assert "n_averaged" in state
    tiny.assert_same_state(load_weights(tiny.clip(), state).state_dict(), model.state_dict())
    # as an attribute of a Lightning module
    holder = nn.Module()
    holder.model = averaged
    tiny.assert_same_state(load_weights(tiny.clip(), holder.state_dict()).state_dict(), model.state_dict())


def test_two_models_in_one_state_dict_are_refused() -> None:
    state = tiny.open_clip_clip().state_dict()
    model = tiny.clip()
    before = tiny.cloned(model.state_dict())
    for first, second in (("model.", "ema_model."), ("", "module."), ("model.", "model.module.")):
        with pytest.raises(ValueError, match=r"keys of CLIP under 2 prefixes \('.*', '.*'\), expected one"):
            load_weights(model, prefixed(state, first) | prefixed(state, second))
    # half a model under a prefix is no model under a prefix
    half = {("model." if k.startswith("visual.") else "") + k: v for k, v in state.items()}
    with pytest.raises(ValueError, match="under 2 prefixes"):
        load_weights(model, half)
    with pytest.raises(ValueError, match=r"two keys for visual\.proj"):
        load_weights(model, state | {"_orig_mod.visual.proj": state["visual.proj"]})
    tiny.assert_same_state(model.state_dict(), before)


def test_what_is_not_clips_keeps_its_name_and_is_refused() -> None:
    state = prefixed(tiny.open_clip_clip().state_dict(), "model.")
    with pytest.raises(ValueError, match=r"1 unexpected: loss\.margin$"):
        load_weights(tiny.clip(), state | {"loss.margin": torch.ones(1)})
    with pytest.raises(ValueError, match=r"1 unexpected: probe\.weight$"):
        load_weights(tiny.clip(), state | {"model.probe.weight": torch.ones(1)})


CHECKPOINTS: dict[str, Callable[[dict], dict]] = {
    "Lightning": lambda s: {
        "epoch": 1,
        "pytorch-lightning_version": "2.5",
        "state_dict": prefixed(s, "model."),
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5), "best_model_path": "x.ckpt"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        "hyper_parameters": {"lr": 1e-3},
    },
    "DeepSpeed": lambda s: {"module": s, "param_shapes": [{"a": torch.Size([2])}], "ds_config": {"zero": 1}},
    "DDP": lambda s: {"model_state_dict": prefixed(s, "module."), "optimizer_state_dict": {}, "loss": 0.3},
    "nested": lambda s: {"model": {"state_dict": {"module": {"model_state_dict": prefixed(s, "_orig_mod.")}}}},
    "a configuration beside": lambda s: {"model": {"name": "ViT-B-32", "width": 3}, "model_state_dict": s},
    "averaged": lambda s: {"state_dict": {"n_averaged": torch.tensor(3)} | prefixed(s, "module.")},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_of_training(tmp_path: Path, kind: str) -> None:
    state = tiny.open_clip_clip().state_dict()
    torch.save(CHECKPOINTS[kind](state), tmp_path / "last.ckpt")
    tiny.assert_same_state(load_weights(tiny.clip(), tmp_path / "last.ckpt").state_dict(), state)
    tiny.assert_same_state(load_weights(tiny.clip(), CHECKPOINTS[kind](state)).state_dict(), state)


BESIDE = {
    "scalars": [np.float64(0.25), np.float32(1.5), np.int64(3), np.bool_(True), np.str_("best"), np.complex64(1j)],
    "big-endian": [np.dtype(">f8").type(2.0), np.array(2.0, dtype=">f4")[()]],
    "arrays": [np.arange(5), np.random.RandomState(0).get_state(), np.array(["a"])],
    "arguments": [argparse.Namespace(lr=np.float32(0.1), epochs=3, nested=argparse.Namespace())],
    "dates": [np.datetime64("2024-01-01")],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", BESIDE)
def test_numpys_values_beside_weights(tmp_path: Path, kind: str, zipped: bool) -> None:
    state = tiny.open_clip_clip().state_dict()
    content = {"epoch": np.int64(3), "beside": BESIDE[kind], "state_dict": state}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    allowed = set(torch.serialization.get_safe_globals())
    tiny.assert_same_state(load_weights(tiny.clip(), tmp_path / "w.pt").state_dict(), state)
    assert set(torch.serialization.get_safe_globals()) == allowed


def test_numpys_scalars_are_pythons(tmp_path: Path) -> None:
    from clipfast.models.checkpoint_files import read_content

    values = [*BESIDE["scalars"], np.array(2.0, dtype=">f4")[()]]
    torch.save(values, tmp_path / "w.pt")
    read = read_content(tmp_path / "w.pt")
    assert read == [v.item() for v in values]
    assert [type(v) for v in read] == [float, float, int, bool, str, complex, float]


def test_code_beside_numpys_values_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "was_run"
    malice = archives.Malice(trace)
    state = tiny.open_clip_clip().state_dict()
    for beside in ([np.float64(1), malice], [malice, np.float64(1)], argparse.Namespace(a=malice), np.array([malice])):
        torch.save({"state_dict": state, "beside": beside}, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=r"refers to (posix|os)\.system, .* code in a file is never run"):
            read_state_dict(tmp_path / "w.pt")
        assert not trace.exists()


def test_arrays_are_no_tensors(tmp_path: Path) -> None:
    torch.save({"visual.proj": np.ones(3)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"got 'visual\.proj': NumPy array, expected a state dict: dense tensors"):
        read_state_dict(tmp_path / "w.pt")


def sharded(folder: Path, state: dict[str, Tensor], suffix: str = "safetensors", parts: int = 3) -> Path:
    """Write shards with an index as transformers does, and return the index."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    write = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    places = {}
    for part in range(parts):
        name = f"{stem}-{part + 1:05}-of-{parts:05}.{suffix}"
        share = {k: v.clone() for k, v in list(state.items())[part::parts]}
        write(share, folder / name)
        places |= dict.fromkeys(share, name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(tmp_path: Path, suffix: str) -> None:
    state = tiny.open_clip_clip().state_dict()
    index = sharded(tmp_path, state, suffix)
    for source in (tmp_path, str(tmp_path), index):
        tiny.assert_same_state(load_weights(tiny.clip(), source).state_dict(), state)


def test_shards_of_transformers(tmp_path: Path) -> None:
    rival = tiny.transformers_clip("quick_gelu")
    rival.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    model = clipfast.create_model(tiny.QUICK_CONFIG, weights=tmp_path)
    tiny.assert_same_state(model.state_dict(), to_openai(rival.state_dict()))
    # the configuration beside the index tells the GELU
    with pytest.raises(ValueError, match="expected 'quick'"):
        clipfast.create_model(tiny.CONFIG, weights=tmp_path / "model.safetensors.index.json")


def test_shards_that_are_not_whole(tmp_path: Path) -> None:
    index = sharded(tmp_path, tiny.open_clip_clip().state_dict())
    content = json.loads(index.read_text())
    second = tmp_path / "model-00002-of-00003.safetensors"
    held = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors: there is no such shard"):
        read_state_dict(tmp_path)
    second.write_bytes(held[:-10])
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: corrupt, truncated"):
        read_state_dict(tmp_path)
    second.write_bytes(held)
    index.write_text(json.dumps(content | {"weight_map": content["weight_map"] | {"visual.more": second.name}}))
    with pytest.raises(ValueError, match=r"model-00002-of-00003\.safetensors: got no visual\.more"):
        read_state_dict(index)
    for name in ("../model.safetensors", "/etc/passwd", "", "a\\b"):
        index.write_text(json.dumps({"weight_map": {"visual.proj": name}}))
        with pytest.raises(ValueError, match="expected the name of a file in the same folder"):
            read_state_dict(index)
    for wrong in ("{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": '):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=r"index\.json: (got no weight_map|corrupt)"):
            read_state_dict(index)


def test_a_distributed_checkpoint_says_how_to_join_it(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="dcp_to_torch_save"):
        read_state_dict(tmp_path)
