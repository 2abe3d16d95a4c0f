"""Runs of ``clipfast train`` on a model and pictures that take milliseconds, and whether two of them ended the same."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import clipfast
from clipfast.data.shards import write_shards
from clipfast.data.sources import Pair
from clipfast.train.checkpoint import Checkpoints
from clipfast.train.config import make_run_config
from clipfast.train.run import RunResult, run_training
from clipfast.train.workplace import Workplace

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}
COUNT = 40


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_place(folder: Path) -> Path:
    """Write shards, held-out pairs and a model's configuration into a folder."""
    words = ["red", "green", "blue", "large", "small"]
    for name, count in (("shards", COUNT), ("held_out", 10)):
        pairs = (Pair(str(i), picture(i), f"{words[i % 5]} {words[i // 5 % 5]} {i}") for i in range(count))
        write_shards(pairs, folder / name, shard_size=15)
    (folder / "tiny.json").write_text(json.dumps(TINY))
    return folder


def settings(place: Path, output: Path, **changes: object) -> dict[str, object]:
    values = {
        "data": str(place / "shards"),
        "model": str(place / "tiny.json"),
        "output": str(output),
        "steps": 6,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "save_every": 2,
        "workers": 0,
        "device": "cpu",
        "tensorboard": False,
    }
    return values | changes


def train(place: Path, output: Path, **changes: object) -> tuple[RunResult, str]:
    console = Console(file=io.StringIO(), width=200)
    result = run_training(make_run_config(settings(place, output, **changes)), console=console)
    return result, console.file.getvalue()


def last_state(output: Path) -> dict[str, torch.Tensor]:
    from clipfast.models.config import CLIPConfig
    from clipfast.train.checkpoint import read_facts
    from clipfast.train.config import TrainConfig
    from clipfast.train.trainer import Trainer

    checkpoints = Checkpoints(output / "checkpoints", Workplace(torch.device("cpu")))
    facts = read_facts(checkpoints.list()[0])
    model = clipfast.create_model(CLIPConfig.from_dict(facts["model"]))
    ema = facts["settings"]["ema_decay"]
    trainer = Trainer(model, TrainConfig(9, ema_decay=ema))
    state = trainer.state()
    checkpoints.load_last(state)
    return state


def assert_same_end(a: Path, b: Path) -> None:
    """Weights, moments and averages are the same bits, and so are the losses on the way."""
    first, second = last_state(a), last_state(b)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    lines = [[json.loads(line) for line in (p / "log.jsonl").read_text().splitlines()] for p in (a, b)]
    assert [(x["step"], x["loss"]) for x in lines[0]] == [(x["step"], x["loss"]) for x in lines[1]]
    weights = [load_file(p / "model.safetensors") for p in (a, b)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[0])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags(values: dict[str, object]) -> list[str]:
    given = []
    for name, value in values.items():
        flag = name.replace("_", "-")
        given += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return given
