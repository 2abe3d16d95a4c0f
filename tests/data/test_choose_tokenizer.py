"""Which tokenizer a model's texts are read with, and which do not fit."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import small
import torch
import vocabularies
from vocabularies import SIGLIP_CONFIG, folder

import clipfast
from clipfast.data.choose_tokenizer import get_tokenizer, keep_tokenizer, tokenizer_beside, tokenizer_for
from clipfast.models.config import TextConfig, get_config

FILES = {"spiece.model": vocabularies.spm, "tokenizer_config.json": lambda: SIGLIP_CONFIG}


@pytest.fixture
def siglip(tmp_path):
    return folder(tmp_path / "siglip", {name: make() for name, make in FILES.items()})


def text_cfg(siglip, **changed: object) -> TextConfig:
    size = clipfast.Tokenizer.from_file(siglip).vocab_size
    return replace(TextConfig(context_length=20, vocab_size=size, eos_id=1), **changed)


def test_clips_own_by_default():
    assert repr(tokenizer_for(TextConfig(context_length=30))) == "Tokenizer(context_length=30)"
    assert repr(clipfast.get_tokenizer("ViT-B-32")) == "Tokenizer(context_length=77)"
    assert repr(clipfast.get_tokenizer("ViT-B-32", context_length=32)) == "Tokenizer(context_length=32)"
    with pytest.raises(ValueError, match="tokenizer: got none for a model with a vocabulary of 32000, which is not"):
        clipfast.get_tokenizer("ViT-B-16-SigLIP")
    with pytest.raises(ValueError, match="ViT-B-33"):
        clipfast.get_tokenizer("ViT-B-33")


def test_a_file_gets_the_models_context(siglip):
    made = tokenizer_for(text_cfg(siglip), siglip)
    assert made("a dog").shape == (1, 20)
    assert torch.equal(made("a dog"), clipfast.get_tokenizer(siglip, context_length=20)("a dog"))
    assert clipfast.get_tokenizer(siglip).context_length == 64
    same = tokenizer_for(text_cfg(siglip), clipfast.Tokenizer.from_file(siglip, context_length=20))
    assert torch.equal(same("a dog"), made("a dog"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vocab_size": 49408}, "tokenizer: got 138 tokens, expected the model's vocabulary of 49408"),
        ({"vocab_size": 1025}, "tokenizer: got 138 tokens, expected the model's vocabulary of 1025"),
        ({"vocab_size": 9}, "tokenizer: got 138 tokens, expected the model's vocabulary of 9"),
        ({"eos_id": None}, "tokenizer: got the EOS id 1, expected 137, where the model reads"),
        ({"eos_id": 2}, "tokenizer: got the EOS id 1, expected 2, where the model reads"),
    ],
)
def test_what_does_not_fit(siglip, changed, message):
    assert text_cfg(siglip).vocab_size == 138
    with pytest.raises(ValueError, match=re.escape(message)):
        tokenizer_for(text_cfg(siglip, **changed), siglip)


def test_what_fits_nearly(siglip):
    # tables are rounded up; features read at the last place need no EOS
    assert tokenizer_for(text_cfg(siglip, vocab_size=1024), siglip)
    assert tokenizer_for(text_cfg(siglip, eos_id=None, pool_type="last"), siglip)
    # tokens that a table lacks are refused when they come
    small = tokenizer_for(text_cfg(siglip, vocab_size=100), siglip)
    with pytest.raises(ValueError, match=r"texts\[0\]: got the token \d+, expected one below 100"):
        small(" ".join(vocabularies.texts(20)))


def test_objects_that_do_not_fit(siglip):
    with pytest.raises(ValueError, match="tokenizer: got a context of 64, expected the model's 20"):
        tokenizer_for(text_cfg(siglip), clipfast.Tokenizer.from_file(siglip))
    with pytest.raises(TypeError, match="tokenizer: got function, expected one of clipfast.Tokenizer, or a"):
        tokenizer_for(text_cfg(siglip), clipfast.tokenize)
    with pytest.raises(ValueError, match="tokenizer: got 49408 tokens, expected the model's vocabulary of 138"):
        tokenizer_for(text_cfg(siglip), clipfast.Tokenizer(20))


def test_a_models_folder_has_its_tokenizer(siglip, tmp_path):
    text = text_cfg(siglip)
    assert tokenizer_beside(siglip, text) == siglip
    # CLIP's is here already
    assert tokenizer_beside(siglip, TextConfig()) is None
    assert tokenizer_beside("ViT-B-32", TextConfig()) is None
    run = tmp_path / "run"
    run.mkdir()
    assert tokenizer_beside(run, text) is None
    keep_tokenizer(tokenizer_for(text, siglip), run)
    (run / "model.json").write_text("{}")
    assert tokenizer_beside(run, text) == tokenizer_beside(run / "model.json", text) == run
    assert torch.equal(tokenizer_for(text, run)(["a Dog!"]), tokenizer_for(text, siglip)(["a Dog!"]))
    keep_tokenizer(clipfast.Tokenizer(), run)
    assert not (run / "clipfast_tokenizer.json").exists()


def test_a_run_of_clip_keeps_no_file(tmp_path, monkeypatch):
    run = small.run(tmp_path / "run")
    assert get_tokenizer(run)(["a dog"]).tolist() == clipfast.Tokenizer(16)(["a dog"]).tolist()
    assert get_tokenizer(run, 20).context_length == 20
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ViT-B-32").mkdir()  # a name is no path
    assert get_tokenizer("ViT-B-32").context_length == 77


def test_a_models_configuration_is_no_tokenizer(siglip, tmp_path):
    run = small.run(tmp_path / "run")
    made = get_tokenizer(run / "model.json")
    assert made(["a dog"]).tolist() == clipfast.Tokenizer(16)(["a dog"]).tolist()
    assert get_tokenizer(run / "model.json", 20).context_length == 20
    other = tmp_path / "other"
    other.mkdir()
    text = text_cfg(siglip)
    keep_tokenizer(tokenizer_for(text, siglip), other)
    config = get_config("ViT-B-16-SigLIP").to_dict()
    config["text_cfg"] |= {"vocab_size": text.vocab_size, "context_length": 64}
    (other / "model.json").write_text(json.dumps(config))
    assert get_tokenizer(other / "model.json")("a dog").tolist() == get_tokenizer(other, 64)("a dog").tolist()
    for broken in ("{", "5", "null", '"text_cfg"'):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(ValueError, match="broken.json"):
            get_tokenizer(tmp_path / "broken.json")
