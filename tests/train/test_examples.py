"""The examples are what the code takes."""

from __future__ import annotations

import subprocess
from pathlib import Path

from clipfast.models.config import get_config
from clipfast.train.config import make_run_config, read_settings
from clipfast.train.demo import SMALL

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def test_the_small_model_is_the_demos():
    assert get_config(EXAMPLES / "small.json") == SMALL


def test_the_settings_are_settings():
    config = make_run_config(read_settings(EXAMPLES / "train.toml"))
    assert config.batch_size == 32768
    assert config.training(12_000_000).steps == 11719


def test_the_emoji_are_trained_with_the_small_model():
    config = make_run_config(read_settings(EXAMPLES / "emoji.toml"))
    assert (config.model, config.steps, config.learning_rate) == (str(EXAMPLES / "small.json"), 200, 1e-3)
    # as the README has them, from the clone's root
    root = EXAMPLES.parent
    assert (config.data, config.val_data) == (str(root / "shards" / "train"), str(root / "shards" / "held_out"))
    assert config.output == str(root / "runs" / "emoji")


def test_the_script_is_a_script():
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sh")], check=True)
