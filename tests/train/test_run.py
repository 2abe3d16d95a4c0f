"""``clipfast train`` as a whole, on a model and pictures that take milliseconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from train_runs import TINY, assert_same_end, flags, free_port, last_state, make_place, picture, settings, train
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.data.shards import write_shards
from clipfast.data.sources import Pair, open_pairs
from clipfast.train.checkpoint import CheckpointError, Checkpoints
from clipfast.train.config import make_run_config, read_settings
from clipfast.train.run import run_training
from clipfast.train.validation import Validation
from clipfast.train.workplace import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with shards, held-out pairs and a model's configuration."""
    return make_place(tmp_path_factory.mktemp("train"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_what_a_run_leaves(place, tmp_path):
    result, said = train(
        place, tmp_path, val_data=str(place / "held_out"), val_every=3, ema_decay=0.5, tensorboard=True
    )
    assert result.step == 6
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoints", "config.json", "log.jsonl", "model.json", "model.safetensors", "tensorboard",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["val_loss" in line for line in lines] == [False, False, True, False, False, True]
    assert lines[-1]["val_loss"] == result.metrics["val_loss"]
    assert result.metrics["val_pairs"] == 10
    assert list((tmp_path / "tensorboard").glob("events*"))
    for shown in ("0.8 M parameters", "40, 8 a step, 6 steps", "val_loss: ", "step 6/6"):
        assert shown in said, said
    # what is written are the averages
    model = clipfast.create_model(tmp_path / "model.json", weights=tmp_path / "model.safetensors")
    state = last_state(tmp_path)
    assert torch.equal(model.visual.proj, state["ema.visual.proj"])
    assert not torch.equal(model.visual.proj, state["weights.visual.proj"])


def test_the_held_out_pairs_are_measured_as_the_evaluation_does(place, tmp_path):
    from clipfast.data.sources import open_pairs
    from clipfast.data.transform import image_transform, load_image
    from clipfast.evaluate.retrieval import retrieval_recall

    result, _ = train(place, tmp_path, steps=2, val_data=str(place / "held_out"), micro_batch_size=4)
    model = clipfast.create_model(tmp_path / "model.json", weights=tmp_path / "model.safetensors").eval()
    source = open_pairs(place / "held_out")
    pairs = [source.read(i) for i in range(len(source))]
    with torch.no_grad():
        image = model.encode_image(torch.stack([image_transform(16)(load_image(p.image)) for p in pairs]), True)
        text = model.encode_text(clipfast.tokenize([p.caption for p in pairs], context_length=8), True)
        logits = model.logit_scale.exp() * image @ text.T
    labels = torch.arange(len(pairs))
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    assert result.metrics["val_loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, value in retrieval_recall(image, text).items():
        if "recall" in name:
            assert result.metrics[f"val_{name}"] == pytest.approx(value)


def test_it_goes_on_where_it_stopped(place, tmp_path):
    options = {"ema_decay": 0.5, "micro_batch_size": 3, "patch_dropout": 0.25}
    train(place, tmp_path / "straight", **options)
    # a shorter run has another schedule, unless it is constant
    train(place, tmp_path / "parts", steps=3, schedule="constant", **options)
    with pytest.warns(UserWarning, match="goes on with other settings: steps = 6 and not 3"):
        train(place, tmp_path / "parts", schedule="constant", **options)
    train(place, tmp_path / "constant", schedule="constant", **options)
    assert_same_end(tmp_path / "parts", tmp_path / "constant")
    assert not torch.equal(
        last_state(tmp_path / "straight")["weights.visual.proj"], last_state(tmp_path / "parts")["weights.visual.proj"]
    )
    _, said = train(place, tmp_path / "parts", schedule="constant", **options)
    assert "going on from step 6" in said


def test_a_damaged_checkpoint_costs_no_more_than_its_steps(place, tmp_path):
    train(place, tmp_path / "straight")
    train(place, tmp_path / "damaged")
    shard = next((tmp_path / "damaged" / "checkpoints" / "step-000000006").glob("__0_*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="step-000000006 is damaged and passed over"):
        _, said = train(place, tmp_path / "damaged")
    assert "going on from step 4" in said
    assert_same_end(tmp_path / "straight", tmp_path / "damaged")


def test_bad_pairs_are_counted_and_named(place, tmp_path):
    pairs = [Pair(str(i), picture(i), f"pair {i}") for i in range(12)]
    pairs[3] = Pair("broken", picture(3)[:60], "broken")
    write_shards(pairs, tmp_path / "shards")
    _, said = train(place, tmp_path / "run", data=str(tmp_path / "shards"), steps=3)
    assert "skipped 2 pairs" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()]
    assert {line["pair"] for line in lines} == {"00000.tar/000000003"}
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])["skipped"] == 2


def test_held_out_pairs_that_vanish_cost_a_warning_and_not_the_run(place, tmp_path, monkeypatch):
    original = Validation.measure

    def lose_them(self, trainer, stop=None):
        self.source = open_pairs(place / "gone")
        return original(self, trainer, stop)

    (place / "gone").mkdir()
    for name in "abcdefghij":
        (place / "gone" / f"{name}.png").write_bytes(b"\x89PNG and no more")
        (place / "gone" / f"{name}.txt").write_text("gone")
    monkeypatch.setattr(Validation, "measure", lose_them)
    with pytest.warns(UserWarning, match="val_data: got 0 pairs that can be read at step 3, expected 2 or more"):
        result, _ = train(place, tmp_path, val_data=str(place / "held_out"), val_every=3)
    assert result.step == 6
    assert result.metrics == {"val_pairs": 0}


def test_pairs_that_none_can_be_read_of_are_one_line(place, tmp_path):
    lines = [f"{name}.png,{name}" for name in "abcdefghijkl"]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    for workers in (0, 1):
        with pytest.raises(ValueError, match="^data: 100 pairs in a row cannot be used, the last is .*$") as error:
            train(place, tmp_path / "run", data=str(tmp_path / "pairs.csv"), workers=workers)
        assert "\n" not in str(error.value)


def test_a_disk_that_fills_up_loses_nothing(place, tmp_path, monkeypatch):
    """A save that fails in the middle is told, training goes on, and the end is an error only if it fails there too."""
    original, full = Checkpoints.save, {4}

    def save(self, state, facts, **options):
        if facts["step"] in full:
            raise OSError(28, "No space left on device")
        return original(self, state, facts, **options)

    monkeypatch.setattr(Checkpoints, "save", save)
    with pytest.warns(UserWarning, match="step 4 was not saved, training goes on: .*No space left"):
        result, _ = train(place, tmp_path / "a", steps=7)
    assert result.step == 7
    # the last save, at a step where one was due anyway, is tried once more
    tried = []

    def save_the_second_time(self, state, facts, **options):
        tried.append(facts["step"])
        if tried.count(6) == 1 and facts["step"] == 6:
            raise OSError(28, "No space left on device")
        return original(self, state, facts, **options)

    monkeypatch.setattr(Checkpoints, "save", save_the_second_time)
    with pytest.warns(UserWarning, match="step 6 was not saved"):
        train(place, tmp_path / "c", steps=6)
    monkeypatch.setattr(Checkpoints, "save", save)
    assert tried == [2, 4, 6, 6]
    full |= {4, 5, 6, 7}
    with pytest.warns(UserWarning, match="was not saved"), pytest.raises(OSError, match="No space left"):
        train(place, tmp_path / "b", steps=7)
    assert Checkpoints(tmp_path / "b" / "checkpoints", Workplace(torch.device("cpu"))).list()[0].name.endswith("2")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "nowhere-{0..3}.tar"}, FileNotFoundError, "4 of 4 shards are missing, the first is nowhere-0.tar"),
        ({"val_data": "nowhere"}, FileNotFoundError, "val_data: got nowhere"),
        ({"batch_size": 41}, ValueError, "batch_size: got 41, expected at most 40"),
        ({"model": "ViT-B-33"}, ValueError, "model name: got 'ViT-B-33'"),
        ({"weights": "none.pt"}, FileNotFoundError, "none.pt"),
        ({"resume": "checkpoints/step-1"}, FileNotFoundError, "expected a folder with checkpoint.json"),
        ({"device": "tpu"}, ValueError, "device: got 'tpu'"),
        ({"output": "{}/tiny.json"}, NotADirectoryError, "output: got .*expected a folder: .*tiny.json is a file"),
        ({"output": "{}/tiny.json/run"}, NotADirectoryError, "output: got .*expected a folder: .*tiny.json is a file"),
        ({"val_data": "{}/empty"}, ValueError, "val_data: got no pairs in .*empty, expected"),
        ({"val_data": "{}/one.csv"}, ValueError, "val_data: got 1 pairs of which 1 can be read, expected 2 or more"),
        (
            {"val_data": "{}/broken.csv"},
            ValueError,
            "got 3 pairs of which 1 can be read, .*2 or more: .*b.png",
        ),
        ({"val_data": "{}/broken.csv", "val_pairs": 2}, ValueError, "val_data: got 2 pairs of which 1 can be read"),
    ],
)
def test_what_cannot_work_is_told_before_training(place, tmp_path, changes, error, message):
    (place / "empty").mkdir(exist_ok=True)
    (place / "good.png").write_bytes(picture(0))
    (place / "b.png").write_bytes(picture(0)[:60])
    (place / "one.csv").write_text("image,caption\ngood.png,good\n")
    (place / "broken.csv").write_text("image,caption\ngood.png,good\nb.png,broken\nnowhere.png,missing\n")
    changes = {n: v.replace("{}", str(place)) if isinstance(v, str) else v for n, v in changes.items()}
    with pytest.raises(error, match=message):
        run_training(make_run_config(settings(place, tmp_path) | changes))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_cuda_without_cuda(place, tmp_path):
    with pytest.raises(ValueError, match="device: got 'cuda', expected 'cpu'"):
        train(place, tmp_path, device="cuda")


def test_a_checkpoint_of_another_model_is_kept(place, tmp_path):
    train(place, tmp_path, steps=2)
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    other = tmp_path / "other.json"
    other.write_text(json.dumps(TINY | {"embed_dim": 16}))
    with pytest.raises(CheckpointError, match=r"got weights.*of shape .*expected"):
        train(place, tmp_path, model=str(other))
    with pytest.raises(ValueError, match="resume: got 'never' and checkpoints"):
        train(place, tmp_path, resume="never")
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


# --- settings ---------------------------------------------------------------------------------------------


def test_flags_go_before_the_file_and_help_tells_all(place, tmp_path):
    file = tmp_path / "run.toml"
    lines = [f"{k} = {json.dumps(v)}" for k, v in settings(place, tmp_path / "run", steps=3).items()]
    file.write_text("\n".join(lines))
    assert read_settings(file)["steps"] == 3
    done = CliRunner().invoke(app, ["train", "--config", str(file), "--steps", "2", "--compile", "no"])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["steps"], config["batch_size"], config["compile"]) == (2, 8, "no")
    told = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    for name in config:
        assert f"--{name.replace('_', '-')}" in told, name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepps = 3", "got 'stepps'; did you mean steps"),
        ("zzz = 2", "got 'zzz', expected settings among .*batch_size"),
        ("steps = 'many'", "steps: got 'many', expected int"),
        ("steps = ", "not TOML"),
        ("precision = 'fp8'", "precision: got 'fp8', expected 'fp32'"),
        ("keep = 0", "keep: got 0, expected at least 1"),
        ("epochs = 2", "steps, epochs: got 6 and 2"),
    ],
)
def test_bad_settings_are_named(place, tmp_path, line, message):
    file = tmp_path / "run.toml"
    file.write_text(line)
    values = settings(place, tmp_path)
    with pytest.raises(ValueError, match=message):
        make_run_config(values | read_settings(file))


def test_epochs_become_steps(place, tmp_path):
    config = make_run_config(settings(place, tmp_path, steps=0, epochs=2.5))
    assert config.training(40).steps == 13
    done = CliRunner().invoke(app, ["train", "--data", str(place / "shards")])
    assert done.exit_code == 2
    assert "error: steps, epochs: got 0 and 0, expected one of them above 0" in done.output


# --- processes --------------------------------------------------------------------------------------------


def on_ranks(per_rank: list[dict[str, object]], folders: Sequence[Path | None] = (None, None)) -> list[tuple[int, str]]:
    """Run ``clipfast train`` on ranks as ``torchrun`` starts them; return exit codes and output."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "clipfast", "train", *flags(values)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folders[rank],
            env=os.environ
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(per_rank))}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for rank, values in enumerate(per_rank)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_as_one(place, tmp_path, strategy):
    train(place, tmp_path / "one", val_data=str(place / "held_out"), patch_dropout=0.0)
    values = settings(place, tmp_path / "two", val_data=str(place / "held_out"), strategy=strategy, workers=1)
    for code, output in on_ranks([values, values]):
        assert code == 0, output
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4, msg=name)
    logs = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [x["loss"] for x in logs[1]] == pytest.approx([x["loss"] for x in logs[0]], rel=1e-4)
    assert logs[1][-1]["val_loss"] == pytest.approx(logs[0][-1]["val_loss"], rel=1e-3)


LEAVING = """
import os
from pathlib import Path
from clipfast.train import run
from clipfast.train.config import make_run_config

def fails(*arguments):
    group = arguments[2].group  # in a frame that the error keeps
    arguments[2].gather(1)
    raise ValueError("as planned")

run._Run.__init__ = fails
before = len(os.listdir("/proc/self/task"))
try:
    run.run_training(make_run_config({"data": "none", "steps": 1}))
except ValueError as error:
    kept = error
    print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_an_error_leaves_no_thread_of_the_group(tmp_path):
    """One that still runs while the interpreter ends may abort the process."""
    places = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    run = [sys.executable, "-c", LEAVING]
    done = subprocess.run(run, env=os.environ | places, capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.stdout.split() == ["0"], done.stderr


@pytest.mark.slow
def test_ranks_that_do_not_fit_say_so_and_do_not_wait(place, tmp_path):
    values = settings(place, tmp_path)
    started = time.monotonic()
    for code, output in on_ranks([values, values | {"learning_rate": 0.5}]):
        assert code == 2
        assert "settings: got learning_rate = 0.5 and not 0.01 on rank 1" in output
    # relative paths, and one of the ranks is somewhere else
    for (code, output), (status, words) in zip(
        on_ranks([values | {"data": "shards"}] * 2, [place, tmp_path]),
        ((1, "data failed on rank 1: FileNotFoundError"), (2, "data: got shards, expected shards")),
        strict=True,
    ):
        assert code == status
        assert words in output
    bad = values | {"weights": str(tmp_path / "none.pt")}
    for code, output in on_ranks([bad, bad]):
        assert code == 2
        assert "none.pt" in output
    assert time.monotonic() - started < 100


KILLER = """
import os, random, signal, sys, time, json
import torch
torch.set_num_threads(1)
from clipfast.train.config import make_run_config
from clipfast.train.run import run_training
from rich.console import Console

values, kills, seed = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)

def start():
    pid = os.fork()
    if pid == 0:
        try:
            run_training(make_run_config(values), console=Console(quiet=True))
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
    return pid

killed = 0
while killed < kills:
    pid = start()
    time.sleep(rng.uniform(0.05, 1.2))
    if os.waitpid(pid, os.WNOHANG) != (0, 0):
        break
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    killed += 1
_, status = os.waitpid(start(), 0)
print(json.dumps({"killed": killed, "status": status}))
"""


@pytest.mark.slow
def test_killed_twenty_times_it_ends_the_same(place, tmp_path):
    """Kill −9 at random moments, saving among them; processes are forked so that a start takes little time."""
    steps, kills = 400, 20
    options = {"steps": steps, "ema_decay": 0.5, "save_every": 5, "patch_dropout": 0.25, "keep": 2}
    train(place, tmp_path / "straight", **options)
    values = settings(place, tmp_path / "killed", **options)
    seed = time.time_ns() % 2**32
    done = subprocess.run(
        [sys.executable, "-c", KILLER, json.dumps(values), str(kills), str(seed)],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout.splitlines()[-1])
    assert outcome["status"] == 0, (seed, done.stdout, done.stderr)
    assert outcome["killed"] == kills, (seed, outcome)
    assert_same_end(tmp_path / "straight", tmp_path / "killed")
    # nothing is left of what was half written but the last part, if it was killed there
    left = {re.sub(r"\d+", "N", p.name) for p in (tmp_path / "killed" / "checkpoints").iterdir()}
    assert left <= {"step-N", ".step-N.part"}
