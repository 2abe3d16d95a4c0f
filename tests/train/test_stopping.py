"""SIGINT and SIGTERM at any moment of a run: it saves, and the run that goes on ends as one that was never stopped."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from train_runs import assert_same_end, flags, free_port, make_place, settings, train

from clipfast.data import batches
from clipfast.train import run
from clipfast.train.checkpoint import Checkpoints
from clipfast.train.interrupt import Stopped
from clipfast.train.trainer import Trainer
from clipfast.train.validation import Validation
from clipfast.train.workplace import Workplace

OPTIONS = {"ema_decay": 0.5, "patch_dropout": 0.25, "val_every": 3, "save_every": 2}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return make_place(tmp_path_factory.mktemp("stopping"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory) -> Path:
    """A run that nothing stops."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("straight")
    train(place, output, val_data=str(place / "held_out"), **OPTIONS)
    return output


def saved_steps(output: Path) -> list[int]:
    return [int(p.name[5:]) for p in Checkpoints(output / "checkpoints", Workplace(torch.device("cpu"))).list()]


def logged(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


# --- moments in one process: a function sends the signal when it is called for the n-th time ----------------


def signal_at(patch: pytest.MonkeyPatch, where: object, name: str, turn: int, signum: int = signal.SIGTERM) -> None:
    original: Callable[..., object] = getattr(where, name)
    calls = iter(range(1, 10**6))

    def signalling(*arguments: object, **options: object) -> object:
        if next(calls) == turn:
            os.kill(os.getpid(), signum)
        return original(*arguments, **options)

    patch.setattr(where, name, signalling)


@pytest.mark.parametrize(
    ("signum", "where", "name", "turn", "stops_after"),
    [
        pytest.param(signal.SIGTERM, run._Run, "_announce", 1, 0, id="before the first step"),
        pytest.param(signal.SIGINT, batches, "load_image", 19, 2, id="reading the third batch"),
        pytest.param(signal.SIGTERM, Trainer, "_average_scalars", 3, 3, id="in the third step"),
        pytest.param(signal.SIGTERM, Checkpoints, "_finish", 2, 4, id="writing a checkpoint"),
        pytest.param(signal.SIGINT, Validation, "_encoded", 1, 3, id="looking at the held-out pairs"),
        pytest.param(signal.SIGTERM, Validation, "_encoded", 3, 6, id="looking at them after the last step"),
    ],
)
def test_it_stops_saved_and_goes_on_to_the_same_end(place, straight, tmp_path, where, name, turn, stops_after, signum):
    options = OPTIONS | {"val_data": str(place / "held_out")}
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, where, name, turn, signum)
        result, said = train(place, tmp_path, **options)
    assert result.training.interrupted
    assert result.step == stops_after
    assert saved_steps(tmp_path)[0] == stops_after
    assert f"stopped after step {stops_after} of 6, saved" in said
    result, _ = train(place, tmp_path, **options)
    assert not result.training.interrupted
    assert_same_end(straight, tmp_path)
    # looks at the held-out pairs that were left are not lost
    for name in ("val_loss", "val_image_to_text_r5"):
        assert [line.get(name) for line in logged(tmp_path)] == [line.get(name) for line in logged(straight)]
    again, _ = train(place, tmp_path, **options)
    assert again.step == 6
    assert len(logged(tmp_path)) == 6


def test_while_the_run_is_prepared_nothing_is_left(place, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, run, "make_model", 1)
        with pytest.raises(Stopped):
            train(place, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_after_the_last_step_it_is_finished(place, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, run, "write_model_folder", 1)
        result, _ = train(place, tmp_path)
    assert not result.training.interrupted
    assert (tmp_path / "model.safetensors").exists()
    assert saved_steps(tmp_path)[0] == 6


# --- processes ----------------------------------------------------------------------------------------------

# workers import it under another name, and read slowly; one that finds the file hangs
SLOW = """
import os, time
from pathlib import Path

if __name__ == "__main__":
    from clipfast.cli import app

    app(prog_name="clipfast")
else:
    from clipfast.data import batches

    load_image = batches.load_image

    def slowly(data):
        time.sleep(float(os.environ["SECONDS_A_PICTURE"]))
        if Path(os.environ["HANG"]).exists():
            time.sleep(1000)
        return load_image(data)

    batches.load_image = slowly
"""


class Job:
    """``clipfast train`` in a process group of its own, alone or under torchrun, with workers that read slowly."""

    def __init__(self, folder: Path, values: dict[str, object], *, ranks: int = 1, seconds: float = 0.02) -> None:
        self.log = Path(str(values["output"])) / "log.jsonl"
        self.hang = folder / "hang"
        program = folder / "slow.py"
        program.write_text(SLOW)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
        self.process = subprocess.Popen(
            [sys.executable, *(launcher if ranks > 1 else []), str(program), "train", *flags(values)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ | {"SECONDS_A_PICTURE": str(seconds), "HANG": str(self.hang), "OMP_NUM_THREADS": "1"},
        )

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + 100
        while not self.log.exists() or self.log.read_text().count("\n") < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def stop(self, signum: int) -> None:
        """Signal the group: workers and trainer, or torchrun alone, whose ranks lead groups of their own."""
        os.killpg(self.process.pid, signum)

    def end(self) -> tuple[int, str]:
        try:
            output = self.process.communicate(timeout=100)[0]
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode, output


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no groups of processes")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "hang"), [(signal.SIGTERM, True), pytest.param(signal.SIGINT, False, marks=pytest.mark.exhaustive)]
)
def test_a_signal_to_all_of_a_group(place, tmp_path, signum, hang):
    """Workers get it as the trainer does; those that hang do not keep it."""
    values = settings(place, tmp_path / "run", steps=3000, save_every=1000, workers=2)
    job = Job(tmp_path, values)
    job.wait_for_steps(3)
    if hang:
        job.hang.touch()
        time.sleep(0.5)
    job.stop(signum)
    code, output = job.end()
    assert code == 0, output
    taken = int(re.search(r"stopped after step (\d+) of 3000, saved", output)[1])
    assert saved_steps(tmp_path / "run") == [taken]
    assert "Traceback" not in output
    assert "exited unexpectedly" not in output


@pytest.mark.slow
@pytest.mark.parametrize("hang", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_sigterm_to_torchrun_alone(place, tmp_path, hang):
    """Ranks agree on the step, even if their workers hang. torchrun itself ends with 1: it takes SIGTERM as failure."""
    values = settings(place, tmp_path / "run", steps=3000, save_every=1000, workers=1)
    job = Job(tmp_path, values, ranks=2)
    job.wait_for_steps(3)
    if hang:
        job.hang.touch()
        time.sleep(0.5)
    job.stop(signal.SIGTERM)
    code, output = job.end()
    taken = int(re.search(r"stopped after step (\d+) of 3000, saved", output)[1])
    assert saved_steps(tmp_path / "run") == [taken]
    assert code == 1
    # its own, and none of a rank or a worker
    assert output.count("Traceback") == 1
    assert "SignalException" in output
    assert "forcefully exiting" not in output


@pytest.mark.exhaustive
@pytest.mark.parametrize("ranks", [1, 2])
def test_stopped_at_twenty_random_moments_it_ends_the_same(place, tmp_path, ranks):
    options = {"steps": 2000, "save_every": 7, "workers": 2 // ranks, "val_every": 9, "schedule": "constant"}
    options |= {"val_data": str(place / "held_out"), "ema_decay": 0.5, "patch_dropout": 0.25}
    seed = time.time_ns() % 2**32
    moments = random.Random(seed)
    codes = []
    values = settings(place, tmp_path / "stopped", **options)
    before = 0
    for turn in range(20):
        job = Job(tmp_path, values, ranks=ranks, seconds=0.01)
        if turn % 4:
            job.wait_for_steps(before + 1)
        time.sleep(moments.uniform(0.0, 3.0))
        job.stop(signal.SIGTERM)
        code, output = job.end()
        codes.append(code)
        # before Python has read the command, SIGTERM does what it does to any process
        early = not turn % 4 and code == -signal.SIGTERM
        assert early or code == ranks - 1, f"{seed}, {turn}: {output}"
        assert "exited unexpectedly" not in output, f"{seed}, {turn}: {output}"
        assert output.count("Traceback") == (0 if early else ranks - 1), f"{seed}, {turn}: {output}"
        saved = saved_steps(tmp_path / "stopped")
        before = saved[0] if saved else 0
        # a look at the held-out pairs that was left is owed, with the line of its step
        lines = len(logged(tmp_path / "stopped")) if saved else 0
        assert before == lines or (before == lines + 1 and before % 9 == 0), f"{seed}, {turn}: {output}"
        print(f"seed {seed}, moment {turn}: status {code}, step {before}", flush=True)
    last = settings(place, tmp_path / "stopped", **options | {"steps": before + 20})
    straight = settings(place, tmp_path / "straight", **options | {"steps": before + 20})
    for end in (last, straight):
        code, output = Job(tmp_path, end, ranks=ranks, seconds=0.0).end()
        assert code == 0, f"{seed}: {output}"
    assert_same_end(tmp_path / "straight", tmp_path / "stopped")
