from __future__ import annotations

import pytest
import small
import torch

from clipfast.data.tokenizer import Tokenizer
from clipfast.evaluate import class_cache
from clipfast.evaluate.class_cache import cached_classifier
from clipfast.evaluate.zero_shot import zero_shot_classifier

NAMES, TEMPLATES = ["cat", "dog", "ox"], ("a {}.", "the {}")


@pytest.fixture
def made(monkeypatch):
    """Counts how often a classifier is made."""
    calls = []

    def make(*arguments, **options):
        calls.append(1)
        return zero_shot_classifier(*arguments, **options)

    monkeypatch.setattr(class_cache, "zero_shot_classifier", make)
    return calls


def test_it_is_made_once_and_has_the_same_bits(tmp_path, made):
    model = small.model()
    first = cached_classifier(model, NAMES, TEMPLATES, folder=tmp_path)
    again = cached_classifier(small.model(), NAMES, TEMPLATES, folder=tmp_path)
    assert len(made) == 1
    assert torch.equal(first, again)
    assert torch.equal(first, zero_shot_classifier(model.encode_text, Tokenizer(16), NAMES, TEMPLATES))


def test_whatever_changes_the_classifier_changes_the_file(tmp_path, made):
    model = small.model()
    cached_classifier(model, NAMES, TEMPLATES, folder=tmp_path)
    cached_classifier(model, [*NAMES[:2], "cow"], TEMPLATES, folder=tmp_path)
    cached_classifier(model, NAMES[::-1], TEMPLATES, folder=tmp_path)
    cached_classifier(model, NAMES, TEMPLATES[:1], folder=tmp_path)
    with torch.no_grad():
        model.text_projection[0, 0] += 1
    cached_classifier(model, NAMES, TEMPLATES, folder=tmp_path)
    assert len(made) == 5
    with torch.no_grad():
        model.visual.proj[0, 0] += 1  # the image tower does not read texts
    cached_classifier(model, NAMES, TEMPLATES, folder=tmp_path)
    assert len(made) == 5
    assert len(list(tmp_path.iterdir())) == 5


@pytest.mark.parametrize("damage", [b"", b"no safetensors at all", None])
def test_a_damaged_file_is_made_anew(tmp_path, made, damage):
    model = small.model()
    expected = cached_classifier(model, NAMES, TEMPLATES, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-7] if damage is None else damage)
    assert torch.equal(cached_classifier(model, NAMES, TEMPLATES, folder=tmp_path), expected)
    assert len(made) == 2
    assert path.read_bytes() == whole


def test_the_usual_folder_and_one_that_cannot_be_written(tmp_path, made, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "own"))
    cached_classifier(small.model(), NAMES, TEMPLATES)
    assert len(list((tmp_path / "own").iterdir())) == 1
    (tmp_path / "file").write_text("")
    cached_classifier(small.model(), NAMES, TEMPLATES, folder=tmp_path / "file")
    assert len(made) == 2


def test_another_vocabulary():
    import clipfast

    config = small.CONFIG | {"text_cfg": small.CONFIG["text_cfg"] | {"vocab_size": 100}}
    with pytest.raises(
        ValueError, match="tokenizer: got none for a model with a vocabulary of 100, which is not CLIP.s 49408"
    ):
        cached_classifier(clipfast.create_model(config), NAMES, TEMPLATES)
