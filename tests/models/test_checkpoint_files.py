"""Files of weights are read as what they hold, never run, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path

import archives
import pytest
import safetensors.torch
import tiny
import torch
from torch import Tensor

from clipfast.models.checkpoint_files import read_state_dict, write_state_dict
from clipfast.models.stated import stated_gelus

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def a_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "visual.proj": torch.randn(8, 4).to(dtype),
        "logit_scale": torch.tensor(2.5, dtype=dtype),
        "counter": torch.arange(3),
        "mask": torch.tensor([True, False]),
        "nothing": torch.empty(0, dtype=dtype),
    }


def save_legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


# ways that others write files
WRITERS: dict[str, tuple[str, Callable[[dict, Path], object]]] = {
    "safetensors": ("w.safetensors", safetensors.torch.save_file),
    "safetensors under another name": ("w.weights", safetensors.torch.save_file),
    "pt": ("w.pt", torch.save),
    "bin": ("w.bin", torch.save),
    "legacy pt": ("w.pt", save_legacy),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", WRITERS)
def test_reads_what_others_write(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    name, write = WRITERS[kind]
    write(a_state(dtype) | {"visual.proj": torch.ones(8, 4, dtype=dtype)}, tmp_path / name)
    expected = a_state(dtype) | {"visual.proj": torch.ones(8, 4, dtype=dtype)}
    tiny.assert_same_state(read_state_dict(tmp_path / name), expected)
    tiny.assert_same_state(read_state_dict(str(tmp_path / name)), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_written_is_read_back(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    state = a_state(dtype)
    write_state_dict(state, tmp_path / f"new/folder/w{suffix}")
    tiny.assert_same_state(read_state_dict(tmp_path / f"new/folder/w{suffix}"), state)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_shared_and_strided_memory_is_written_apart(tmp_path: Path, suffix: str) -> None:
    whole = torch.randn(1000, 6)
    parameter = torch.nn.Parameter(torch.randn(3))
    state = {
        "whole": whole,
        "again": whole,
        "transposed": whole.T,
        "part": whole[2:4],
        "overlap": whole[3:5],
        "columns": whole[:, 1:3],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "parameter": parameter,
        "same parameter": parameter,
    }
    path = tmp_path / f"w{suffix}"
    write_state_dict(state, path)
    read = read_state_dict(path)
    tiny.assert_same_state(read, state)
    assert len({v.untyped_storage().data_ptr() for v in read.values()}) == len(state)
    # and a view's file is of the view's size
    write_state_dict({"row": whole[:1]}, path)
    assert path.stat().st_size < whole.nbytes


def test_safetensors_are_marked_as_transformers_wants(tmp_path: Path) -> None:
    write_state_dict(a_state(), tmp_path / "w.safetensors")
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("name", ["w.ckpt", "w", "w.safetensors.gz"])
def test_other_endings_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"path: got '.*{name}', expected .*\.safetensors, \.pt, \.bin or \.npz"):
        write_state_dict(a_state(), tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrapped", ["open_clip", "clipfast"])
def test_training_checkpoints_are_looked_into(tmp_path: Path, wrapped: str) -> None:
    state = a_state()
    content = {
        "open_clip": {
            "epoch": 3,
            "name": "run",
            "state_dict": state,
            "optimizer": {"state": {}},
            "scaler": {"scale": 2.0},
        },
        "clipfast": {"format": "clipfast.checkpoint.1", "step": 7, "config": {}, "model": state, "optimizer": None},
    }[wrapped]
    torch.save(content, tmp_path / "epoch_3.pt")
    read = read_state_dict(tmp_path / "epoch_3.pt")
    tiny.assert_same_state(read, state)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"]
)
def test_folders(tmp_path: Path, name: str) -> None:
    write_state_dict(a_state() | {"visual.proj": torch.ones(2)}, tmp_path / name)
    assert torch.equal(read_state_dict(tmp_path)["visual.proj"], torch.ones(2))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"folder without weights, expected one of model\.safetensors"):
        read_state_dict(tmp_path)
    # a hub's name is a file's name here
    with pytest.raises(FileNotFoundError, match=r"openai/clip-vit-base-patch32: there is no such file.*downloaded"):
        read_state_dict("openai/clip-vit-base-patch32")


def test_a_file_that_may_not_be_read_is_not_called_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state_dict(a_state(), tmp_path / "w.pt")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError):
        read_state_dict(tmp_path / "w.pt")


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """What a pickle makes when it is run; the test of it below proves that it would."""
    return tmp_path / "was_run"


def test_malice_works_where_code_is_run(trace: Path) -> None:
    pickle.loads(pickle.dumps(archives.Malice(trace)))
    assert trace.exists()


@pytest.mark.parametrize("name", ["w.pt", "w.bin", "w.ckpt"])
@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_code_in_a_pickle_is_refused(tmp_path: Path, trace: Path, name: str, save: Callable) -> None:
    save({"visual.proj": torch.ones(2), "logit_scale": archives.Malice(trace)}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: refers to (posix|os)\.system, .* code in a file is never run"):
        read_state_dict(tmp_path / name)
    assert not trace.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_bare_pickle_is_refused(tmp_path: Path, trace: Path) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "w.bin").write_bytes(pickle.dumps({"a": archives.Malice(trace)}, protocol))
        with pytest.raises(ValueError, match=r"w\.bin: "):
            read_state_dict(tmp_path / "w.bin")
        assert not trace.exists()


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name, write in WRITERS.values():
        write({"a": torch.ones(1)}, tmp_path / name)
        read_state_dict(tmp_path / name)
    archives.save_scripted(tiny.open_clip_clip(), tmp_path / "a.pt")
    read_state_dict(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        read_state_dict("https://example.org/ViT-B-32.pt")


@pytest.fixture(params=[*WRITERS, "archive"])
def whole_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "archive":
        archives.save_scripted(tiny.open_clip_clip(), tmp_path / "ViT-B-32.pt")
        return tmp_path / "ViT-B-32.pt"
    name, write = WRITERS[request.param]
    write({"visual.proj": torch.randn(64, 64), "logit_scale": torch.tensor(2.0)}, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_truncated_files(whole_file: Path, kept: float) -> None:
    content = whole_file.read_bytes()
    whole_file.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=r"(w\.\w+|ViT-B-32\.pt): corrupt, truncated, or no file of weights \(\w+: "):
        read_state_dict(whole_file)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_refused_or_read_but_nothing_else(whole_file: Path) -> None:
    content = whole_file.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        # headers and pickles are at one of the ends
        for _ in range(generator.choice([1, 3, 30])):
            place = generator.randrange(min(1500, len(damaged)))
            damaged[place if generator.random() < 0.5 else -place - 1] = generator.randrange(256)
        whole_file.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            read_state_dict(whole_file)
            continue
        refused += 1
    assert refused > 10


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "w.bin"])
@pytest.mark.parametrize("content", [b"", b"hello, this is a text file\n", b'{"a": 1}', bytes(range(256)) * 10])
def test_files_of_something_else(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: corrupt, truncated, or"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "got list, expected a state dict"),
        (torch.ones(1), "got Tensor, expected a state dict"),
        ({}, "got no entries, expected a state dict"),
        ({"state_dict": {}}, "got no entries, expected a state dict"),
        ({"a": torch.ones(1), "epoch": 3}, "got 'epoch': int, expected a state dict: dense tensors by name"),
        ({"a": {"b": torch.ones(1)}}, "got 'a': dict, expected"),
        ({3: torch.ones(1)}, "got 3: tensor, expected"),
        ({str(i): i for i in range(19)}, "got '0': int, .*'9': int, … and 9 more, expected"),
        ({"a": torch.eye(3).to_sparse()}, r"got 'a': torch\.sparse_coo tensor on cpu, expected"),
        ({"a": torch.ones(3, device="meta")}, r"got 'a': torch\.strided tensor on meta, expected"),
    ],
)
def test_contents_that_are_no_state_dict(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=rf"w\.pt: {message}"):
        read_state_dict(tmp_path / "w.pt")


@pytest.mark.parametrize(
    ("config", "gelus"),
    [
        (
            {"model_type": "clip", "vision_config": {"hidden_act": "gelu"}, "text_config": {"hidden_act": "gelu"}},
            {"image": {"none"}, "text": {"none"}},
        ),
        ({"model_type": "clip", "vision_config": {}, "text_config": {}}, {"image": {"quick"}, "text": {"quick"}}),
        ({"model_type": "clip"}, {"image": {"quick"}, "text": {"quick"}}),
        ({"model_type": "clip_vision_model", "hidden_act": "gelu_pytorch_tanh"}, {"image": {"tanh"}}),
        ({"model_type": "clip_text_model", "hidden_act": "relu"}, {"text": {"relu"}}),
        ({"model_type": "metaclip_2"}, {"image": {"quick"}, "text": {"quick"}}),
        (
            {"model_type": "siglip", "vision_config": {"hidden_act": "gelu"}, "text_config": {}},
            {"image": {"none"}, "text": {"tanh"}},
        ),
        ({"model_type": "siglip2_text_model"}, {"text": {"tanh"}}),
        ({"model_type": "bert", "hidden_act": "gelu"}, {}),
        ({"architecture": "vit_base_patch32_clip_224"}, {}),
        ([1, 2], {}),
    ],
)
def test_gelus_that_transformers_states(tmp_path: Path, config: object, gelus: dict[str, set[str]]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stated_gelus(tmp_path) == gelus
    assert stated_gelus(tmp_path / "model.safetensors") == gelus
    # a file of another name need not be the configuration's
    assert stated_gelus(tmp_path / "epoch_3.pt") == {}


@pytest.mark.parametrize(
    ("sizes", "gelus"), [({"quick_gelu": True}, {"quick"}), ({"embed_dim": 512}, {"none", "tanh"}), (None, None)]
)
def test_gelus_that_open_clip_states(tmp_path: Path, sizes: dict | None, gelus: set[str] | None) -> None:
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes}))
    gelus = {} if gelus is None else {"image": gelus, "text": gelus}
    assert stated_gelus(str(tmp_path)) == gelus
    assert stated_gelus(tmp_path / "open_clip_model.safetensors") == gelus


def test_a_corrupt_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json: corrupt, expected a configuration in JSON"):
        stated_gelus(tmp_path)
