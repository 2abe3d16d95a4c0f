from __future__ import annotations

import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
from collections import namedtuple

import pytest
import torch

from clipfast.train.checkpoint import CheckpointError, Checkpoints, read_facts
from clipfast.train.workplace import Workplace

ALONE = Workplace(torch.device("cpu"))


def some_state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weights.a": torch.randn(5, 7, generator=generator),
        "weights.scale": torch.randn((), generator=generator),
        "weights.half": torch.randn(4, generator=generator).bfloat16(),
        "buffers.count": torch.tensor(3 + seed),
        "weights.turned": torch.randn(3, 6, generator=generator).t(),
    }


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path / "checkpoints", ALONE, keep=2)


def names(checkpoints: Checkpoints) -> list[str]:
    return [p.name for p in checkpoints.list()]


def test_round_trip_is_bitwise(checkpoints):
    path = checkpoints.save(some_state(), {"step": 7, "config": {"a": [1, 2]}})
    state = some_state(1)
    assert checkpoints.load_last(state) == {"step": 7, "config": {"a": [1, 2]}} == read_facts(path)
    assert_same(state, some_state())
    assert checkpoints.load(path, some_state(2))["step"] == 7


def test_the_last_and_the_best_are_kept(checkpoints):
    for step, score in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, 2.5)):
        checkpoints.save(some_state(step), {"step": step}, score=score)
    assert names(checkpoints) == ["step-000000005", "step-000000004", "step-000000002"]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == sorted(names(checkpoints))
    # the same step once more takes the place of the old one
    checkpoints.save(some_state(50), {"step": 5})
    state = some_state()
    checkpoints.load_last(state)
    assert_same(state, some_state(50))


def damage(path, kind: str) -> None:
    shard = next(path.glob("__0_*"))
    if kind == "cut short":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif kind == "a bit turned":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    elif kind == "a file gone":
        shard.unlink()
    elif kind == "record cut":
        (path / "checkpoint.json").write_text((path / "checkpoint.json").read_text()[:-20])
    elif kind == "contents gone":
        (path / ".metadata").unlink()


@pytest.mark.parametrize("kind", ["cut short", "a bit turned", "a file gone", "record cut", "contents gone"])
def test_a_damaged_one_is_passed_over(checkpoints, kind):
    checkpoints.save(some_state(1), {"step": 1})
    last = checkpoints.save(some_state(2), {"step": 2})
    damage(last, kind)
    state = some_state()
    with pytest.warns(UserWarning, match="step-000000002 is damaged and passed over"):
        assert checkpoints.load_last(state)["step"] == 1
    assert_same(state, some_state(1))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.load(last, state)
    assert_same(state, some_state(1))


def test_none_is_none(checkpoints, tmp_path):
    assert checkpoints.load_last(some_state()) is None
    with pytest.raises(FileNotFoundError, match="expected a folder with checkpoint.json"):
        checkpoints.load(tmp_path, some_state())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"weights.more": torch.zeros(2)}), "got no weights.more"),
        (lambda s: s.pop("weights.a"), "got weights.a, expected a checkpoint of this model"),
        (lambda s: s.update({"weights.a": torch.zeros(5, 8)}), r"got weights.a of shape \(5, 7\), expected \(5, 8\)"),
        (lambda s: s.update({"weights.a": torch.zeros(5, 7).double()}), "in torch.float32, expected torch.float64"),
    ],
)
def test_another_models(checkpoints, change, message):
    checkpoints.save(some_state(), {"step": 1})
    state = some_state(1)
    change(state)
    before = {n: t.clone() for n, t in state.items()}
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load_last(state)
    assert_same(state, before)


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_code_is_never_run(checkpoints, capsys):
    path = checkpoints.save(some_state(), {"step": 1})
    (path / ".metadata").write_bytes(pickle.dumps(Code()))
    record = json.loads((path / "checkpoint.json").read_text())
    import hashlib

    record["files"][".metadata"] = hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()
    (path / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"it names builtins.print, expected nothing but tensors"):
        checkpoints.load_last(some_state())
    assert "ran" not in capsys.readouterr().out


def test_objects_beside_tensors_are_not_unpickled(checkpoints, capsys):
    path = checkpoints.save(some_state(), {"step": 1})
    state = {n: t for n, t in some_state().items() if n != "weights.a"}
    import torch.distributed.checkpoint as dcp

    shutil.rmtree(path)
    dcp.save(state | {"weights.a": {"x": Code()}}, checkpoint_id=str(path), no_dist=True)
    (path / "checkpoint.json").write_text(
        json.dumps({"format": "clipfast.checkpoint.2", "score": None, "files": {}, "facts": {"step": 1}})
    )
    with pytest.raises((CheckpointError, RuntimeError)):
        checkpoints.load_last(state)
    assert "ran" not in capsys.readouterr().out


def test_a_write_that_fails_leaves_the_others_as_they_were(checkpoints):
    checkpoints.save(some_state(1), {"step": 1})
    large = some_state(2) | {"weights.large": torch.zeros(1 << 20)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match=r"could not be written|File too large"):
            checkpoints.save(large, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in checkpoints.folder.iterdir()] == ["step-000000001"]
    state = some_state()
    assert checkpoints.load_last(state)["step"] == 1
    assert_same(state, some_state(1))


def test_remains_of_a_killed_run_are_no_checkpoint(checkpoints):
    path = checkpoints.save(some_state(1), {"step": 1})
    shutil.copytree(path, path.with_name(".step-000000002.part"))
    (path.with_name("step-000000003")).mkdir()
    assert names(checkpoints) == ["step-000000001"]
    checkpoints.save(some_state(2), {"step": 2})
    assert names(checkpoints) == ["step-000000002", "step-000000001"]


def test_room_is_looked_for_before_training(checkpoints, monkeypatch):
    checkpoints.check_room(some_state())
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10, 9, 300))
    with pytest.raises(OSError, match=r"expected 0\.00 GB for checkpoints.*make room, or keep fewer"):
        checkpoints.check_room(some_state())


def test_a_folder_that_cannot_be_written(checkpoints, monkeypatch):
    def refuse(*_: object) -> io.BufferedWriter:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        checkpoints.check_room(some_state())
