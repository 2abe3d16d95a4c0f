"""``clipfast train`` on Parquet and on pictures with several captions: killed or not, the same bits."""

from __future__ import annotations

import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file
from samples import png
from typer.testing import CliRunner

from clipfast.cli import app

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 8, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_run_goes_on_with_the_same_bits(tmp_path):
    words = [[f"word {i}", f"thing {i}", None] if i % 3 else None for i in range(24)]
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    for file in range(2):
        rows = range(12 * file, 12 * file + 12)
        columns = {"photo": [png(i, 16) for i in rows], "alt": [words[i] for i in rows]}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{file}.parquet", row_group_size=5)
    data = str(tmp_path / "*.parquet")
    chosen = ["--image-column", "photo", "--caption-column", "alt"]

    def train(output: str, steps: int, *flags: str):
        common = ["--model", str(tmp_path / "tiny.json"), "--batch-size", "6", "--workers", "0", "--device", "cpu"]
        common += ["--schedule", "constant", "--save-every", "100", "--no-tensorboard", "--val-data", data]
        done = CliRunner().invoke(
            app,
            [
                "train",
                "--data",
                data,
                *chosen,
                *common,
                "--steps",
                str(steps),
                "--output",
                str(tmp_path / output),
                *flags,
            ],
        )
        assert done.exit_code == 0, done.output
        return load_file(tmp_path / output / "model.safetensors"), done.output

    whole, said = train("whole", 8)
    train("parts", 3)
    parts, _ = train("parts", 8)
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert "pairs: 24, 6 a step" in said
    skipped = [json.loads(line) for line in (tmp_path / "whole" / "skipped-0.jsonl").read_text().splitlines()]
    assert len(skipped) > 16
    assert any("alt 3" in str(entry) for entry in skipped)
    assert any("got null, expected a text or a list of texts" in str(entry) for entry in skipped)
