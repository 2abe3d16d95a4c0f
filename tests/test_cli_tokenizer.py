"""Commands for models with another vocabulary than CLIP's: texts are read with the file given, or the folder's."""

from __future__ import annotations

import json

import numpy as np
import pytest
import small
import torch
import vocabularies
from typer.testing import CliRunner

import clipfast
from clipfast.cli import app
from clipfast.evaluate.class_cache import cached_classifier
from clipfast.models.model_folder import write_model_folder

SIZE = 138
TEXT = small.CONFIG["text_cfg"] | {"vocab_size": SIZE, "pool_type": "last", "no_causal_mask": True}
CONFIG = small.CONFIG | {"text_cfg": TEXT}
NONE = f"error: tokenizer: got none for a model with a vocabulary of {SIZE}, which is not CLIP's 49408"


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "spiece.model").write_bytes(vocabularies.spm())
    torch.manual_seed(0)
    clip = clipfast.create_model(CONFIG).eval()
    write_model_folder(tmp_path / "model", clip.config, clip.state_dict())
    small.write_pictures(tmp_path / "pictures", 6)
    return tmp_path


def run(*arguments: object):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done


def test_a_run_remembers_its_tokenizer(here):
    training = (
        "train", "--data", "pictures", "--val-data", "pictures", "--model", "model/model.json", "--output", "run",
        "--steps", "1", "--batch-size", "4", "--workers", "1", "--device", "cpu", "--no-tensorboard",
    )  # fmt: skip
    assert NONE in run(*training).stderr
    assert not (here / "run").exists()
    done = run(*training, "--tokenizer", "spiece.model")
    assert done.exit_code == 0, done.output
    (here / "spiece.model").unlink()  # the run's folder is enough
    assert (here / "run" / "tokenizer.model").read_bytes() == vocabularies.spm()
    done = run("eval", "run", "--data", "pictures", "--json")
    assert json.loads(done.stdout)["counts"] == {"pictures": 6, "texts": 6}
    recall = json.loads(done.stdout)["metrics"]
    logged = json.loads((here / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert all(name.isidentifier() for name in logged)
    assert logged["val_image_to_text_r5"] == pytest.approx(recall["image_to_text_r5"])


def test_the_flag_of_every_command(here):
    given = ("--tokenizer", "spiece.model")
    (here / "texts.txt").write_text("a red DOG!\ntwo cats\n")
    commands = [
        ("eval", "model", "--data", "pictures"),
        ("embed", "model", "texts.txt", "t.npy", "--kind", "text"),
        ("show", "model", "pictures/00.png", "--output", "shown", "--text", "a dog"),
    ]
    for command in commands:
        done = run(*command)
        assert (done.exit_code, NONE in done.stderr) == (2, True), done.output
        assert run(*command, *given).exit_code == 0
    # what was embedded is what the model makes of SigLIP's tokens
    from clipfast.models.open_model import open_model

    clip = open_model("model", device="cpu")
    tokens = clipfast.Tokenizer.from_file("spiece.model", context_length=16)(["a red DOG!", "two cats"])
    expected = torch.nn.functional.normalize(clip.encode_text(tokens), dim=-1)
    assert np.allclose(np.load("t.npy"), expected.numpy(), atol=1e-6)
    # search finds it again by itself; another tokenizer's features are not these
    done = run("search", "t.npy", "two cats", "--json")
    assert json.loads(done.stdout)["hits"][0]["name"] == "two cats"
    (here / "other").mkdir()
    (here / "other" / "spiece.model").write_bytes(vocabularies.spm())
    (here / "other" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer", "pad_token": "</s>"}')
    done = run("embed", "model", "texts.txt", "t.npy", "--kind", "text", "--tokenizer", "other")
    assert "of another run (tokenizer differ)" in done.stderr
    done = run("search", "t.npy", "two cats", "--tokenizer", "other")
    assert "tokenizer: got another than that" in done.stderr
    # pictures need none
    assert run("embed", "model", "pictures", "p.npy").exit_code == 0
    assert NONE in run("search", "p.npy", "a dog").stderr
    assert run("search", "p.npy", "--image", "pictures/00.png").exit_code == 0
    assert run("search", "p.npy", "a dog", *given).exit_code == 0
    assert run("show", "model", "pictures/00.png", "--output", "shown").exit_code == 0


def test_a_file_that_does_not_fit(here):
    for file, words in (
        ("nothing.json", "error: tokenizer: got nothing.json, expected a tokenizer.json, a .model, or a folder"),
        ("pictures/00.png", "error: pictures/00.png: got "),
    ):
        done = run("eval", "model", "--data", "pictures", "--tokenizer", file)
        assert (done.exit_code, words in done.stderr) == (2, True), done.output
    small.run(here / "clip")
    done = run("eval", "clip", "--data", "pictures", "--tokenizer", "spiece.model")
    assert f"error: tokenizer: got {SIZE} tokens, expected the model's vocabulary of 49408" in done.stderr
    done = run("demo", "--model", "model/model.json", "--steps", "1", "--output", "demo")
    assert "error: model: got a vocabulary of 138, expected CLIP's 49408" in done.stderr
    assert not (here / "demo").exists()


def test_kept_classifiers_are_a_tokenizers(here):
    from clipfast.models.open_model import open_model

    clip = open_model("model", device="cpu")
    made = {}
    for clean in ("siglip", "lowercase"):
        tokenizer = clipfast.Tokenizer.from_file("spiece.model", context_length=16, clean=clean)
        for _ in range(2):  # made, and read again
            made[clean] = cached_classifier(clip, ["a dog!", "cats."], ["{}"], tokenizer=tokenizer)
    assert len(list((here / "cache").glob("classes-*"))) == 2
    assert not torch.equal(made["siglip"], made["lowercase"])
