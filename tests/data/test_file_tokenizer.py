"""Tokenizers from files against those of transformers and open_clip, token for token, padded and cut."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import re
from pathlib import Path

import pytest
import torch
import vocabularies
from vocabularies import SIGLIP2_CONFIG, SIGLIP_CONFIG, folder

import clipfast
from clipfast.data.cleaning import without_surrogates

TEXTS = [*vocabularies.HARD, *vocabularies.texts(250)]
# their tokenizers raise TypeError for lone surrogates
CLEAN_TEXTS = [without_surrogates(text) for text in TEXTS]


def of_transformers(tokenizer, length: int):
    return lambda texts: (
        tokenizer(texts, max_length=length, padding="max_length", truncation=True, return_tensors="pt").input_ids
    )


def open_clip_config(**text_cfg: object) -> dict:
    text_cfg = {"hf_tokenizer_name": "someone/something"} | text_cfg
    return {"model_cfg": {"embed_dim": 8, "vision_cfg": {}, "text_cfg": text_cfg}}


def assert_same(ours, theirs) -> None:
    expected, found = theirs(CLEAN_TEXTS), ours(TEXTS)
    assert found.dtype == torch.int64
    for text, mine, other in zip(TEXTS, found, expected, strict=True):
        assert mine.tolist() == other.tolist(), text


# --- what each model's own tokenizer does -----------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("length", [64, 16])
def test_siglip(tmp_path, length):
    from transformers import SiglipTokenizer

    place = folder(tmp_path / "siglip", {"spiece.model": vocabularies.spm(), "tokenizer_config.json": SIGLIP_CONFIG})
    theirs = SiglipTokenizer.from_pretrained(place)
    ours = clipfast.Tokenizer.from_file(place, context_length=length)
    assert_same(ours, of_transformers(theirs, length))
    assert (ours.sot_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (None, 1, 1, theirs.vocab_size)
    # the file alone is known by its special tokens
    alone = folder(tmp_path / "alone", {"any.model": vocabularies.spm()}) / "any.model"
    assert torch.equal(clipfast.Tokenizer.from_file(alone, context_length=length)(TEXTS), ours(TEXTS))
    assert clipfast.Tokenizer.from_file(alone).context_length == 64


@pytest.mark.parametrize("length", [64, 12])
def test_siglip_2(tmp_path, length):
    from transformers import AutoTokenizer

    files = {"tokenizer.json": vocabularies.gemma_json(), "tokenizer_config.json": SIGLIP2_CONFIG}
    place = folder(tmp_path / "siglip2", files)
    theirs = AutoTokenizer.from_pretrained(place)
    assert type(theirs).__name__ == "Siglip2Tokenizer"
    ours = clipfast.Tokenizer.from_file(place, context_length=length)
    assert_same(ours, of_transformers(theirs, length))
    assert (ours.sot_id, ours.eos_id, ours.pad_id) == (None, 1, 0)
    assert ours(["A Dog"]).tolist() == ours(["a dog"]).tolist()
    for text in TEXTS[:20]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)
    alone = folder(tmp_path / "alone", {"tokenizer.json": vocabularies.gemma_json()}) / "tokenizer.json"
    assert torch.equal(clipfast.Tokenizer.from_file(alone, context_length=length)(TEXTS), ours(TEXTS))


def test_siglip_2_under_gemmas_name_is_lower_case_too(tmp_path):
    """Its repositories name Gemma's class, whose tokens of upper case the model has never seen."""
    config = SIGLIP2_CONFIG | {"tokenizer_class": "GemmaTokenizer"}
    files = {"tokenizer.json": vocabularies.gemma_json(), "tokenizer_config.json": config}
    gemma = clipfast.Tokenizer.from_file(folder(tmp_path / "gemma", files))
    siglip = clipfast.Tokenizer.from_file(
        folder(tmp_path / "siglip2", files | {"config.json": {"model_type": "siglip"}})
    )
    assert gemma(["A DOG"]).tolist() != gemma(["a dog"]).tolist()
    assert siglip(["A DOG"]).tolist() == siglip(["a dog"]).tolist() == gemma(["a dog"]).tolist()


def test_padding_from_the_left_where_transformers_does(tmp_path):
    from transformers import AutoTokenizer

    config = {name: value for name, value in SIGLIP2_CONFIG.items() if name != "padding_side"}
    config |= {"truncation_side": "left", "add_bos_token": True}  # it does not look at the latter here
    files = {"tokenizer.json": vocabularies.gemma_json(), "tokenizer_config.json": config}
    place = folder(tmp_path / "left", files)
    ours = clipfast.Tokenizer.from_file(place, context_length=9)
    assert_same(ours, of_transformers(AutoTokenizer.from_pretrained(place), 9))
    assert ours("a dog")[0, 0] == 0
    assert ours.sot_id is None


@pytest.mark.parametrize("length", [64, 16])
def test_open_clip_siglip(tmp_path, length):
    import open_clip
    from transformers import T5Tokenizer

    source = {"spiece.model": vocabularies.spm(), "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}
    t5 = T5Tokenizer.from_pretrained(folder(tmp_path / "t5", source), extra_ids=0)
    t5.pad_token_id = 1
    t5.save_pretrained(tmp_path / "siglip")
    config = open_clip_config(context_length=length, tokenizer_kwargs={"clean": "canonicalize"})
    place = folder(tmp_path / "siglip", {"open_clip_config.json": config})
    ours = clipfast.Tokenizer.from_file(place)
    assert_same(ours, open_clip.get_tokenizer(f"local-dir:{place}"))
    assert (ours.context_length, ours.eos_id, ours.pad_id) == (length, 1, 1)


def test_open_clip_siglip_2(tmp_path):
    import open_clip

    config = open_clip_config(context_length=64, tokenizer_kwargs={"clean": "canonicalize"})
    place = folder(
        tmp_path / "siglip2",
        {
            "tokenizer.json": vocabularies.gemma_json(),
            "tokenizer_config.json": SIGLIP2_CONFIG | {"tokenizer_class": "GemmaTokenizer"},
            "open_clip_config.json": config,
        },
    )
    assert_same(clipfast.Tokenizer.from_file(place), open_clip.get_tokenizer(f"local-dir:{place}"))


@pytest.mark.parametrize("strip", [True, False])
def test_clipa(tmp_path, strip):
    import open_clip

    config = open_clip_config(context_length=32, tokenizer_kwargs={"strip_sep_token": strip})
    files = {
        "tokenizer.json": vocabularies.bert_json(),
        "tokenizer_config.json": {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
    }
    place = folder(tmp_path / "clipa", files | {"open_clip_config.json": config})
    ours = clipfast.Tokenizer.from_file(place)
    assert_same(ours, open_clip.get_tokenizer(f"local-dir:{place}"))
    assert (ours(TEXTS) == 3).any() != strip
    assert ours.eos_id == (None if strip else 3)
    if strip:
        plain = folder(tmp_path / "bert", files)
        asked = clipfast.Tokenizer.from_file(plain, context_length=32, clean="whitespace", strip_sep_token=True)
        assert torch.equal(asked(TEXTS), ours(TEXTS))


@pytest.mark.parametrize("clean", ["whitespace", "canonicalize"])
def test_xlm_v(tmp_path, clean):
    """MetaCLIP 2 and the worldwide models: from the .model, whose ids are shifted, and from the tokenizer.json."""
    import open_clip

    config = open_clip_config(context_length=77, tokenizer_kwargs={"clean": clean})
    files = {
        "sentencepiece.bpe.model": vocabularies.spm("xlmr"),
        "tokenizer_config.json": {"tokenizer_class": "XLMRobertaTokenizer"},
        "open_clip_config.json": config,
    }
    place = folder(tmp_path / "xlmv", files)
    theirs = open_clip.get_tokenizer(f"local-dir:{place}")
    ours = clipfast.Tokenizer.from_file(place)
    assert_same(ours, theirs)
    assert (ours.sot_id, ours.eos_id, ours.pad_id, ours.vocab_size) == (0, 2, 1, len(theirs.tokenizer))
    theirs.save_pretrained(tmp_path / "saved")
    whole = clipfast.Tokenizer.from_file(folder(tmp_path / "saved", {"open_clip_config.json": config}))
    assert_same(whole, theirs)
    assert whole.vocab_size == ours.vocab_size
    assert ours.decode(ours.encode("a photo")) == "a photo"


def test_mt5(tmp_path):
    """transformers' normaliser looks at graphemes, SentencePiece's does not: alike where texts are NFKC."""
    import unicodedata

    from transformers import T5Tokenizer

    files = {"spiece.model": vocabularies.spm(), "tokenizer_config.json": {"tokenizer_class": "T5Tokenizer"}}
    place = folder(tmp_path / "mt5", files)
    theirs = T5Tokenizer.from_pretrained(place, extra_ids=0)
    ours = clipfast.Tokenizer.from_file(place, context_length=20)
    assert ours.pad_id == 0
    texts = [unicodedata.normalize("NFKC", text) for text in CLEAN_TEXTS if text.isascii() or max(text) < "\u0300"]
    assert len(texts) > 30
    assert torch.equal(ours(texts), of_transformers(theirs, 20)(texts))


def test_a_tokenizer_json_that_says_everything(tmp_path):
    import tokenizers

    bert = tokenizers.Tokenizer.from_str(vocabularies.bert_json())
    bert.enable_padding(pad_id=4, pad_token="[MASK]", length=20, direction="left")
    bert.enable_truncation(20)
    bert.save(str(tmp_path / "tokenizer.json"))
    ours = clipfast.Tokenizer.from_file(tmp_path / "tokenizer.json", context_length=20)
    assert ours(TEXTS).tolist() == [bert.encode(text).ids for text in CLEAN_TEXTS]
    assert (ours.pad_id, ours.settings.pad_left, ours.settings.clean) == (4, True, ())


def test_a_folder_of_open_clip_with_clips_tokenizer(tmp_path):
    config = {"model_cfg": {"text_cfg": {"context_length": 32}}}
    made = clipfast.Tokenizer.from_file(folder(tmp_path, {"open_clip_config.json": config}))
    assert repr(made) == "Tokenizer(context_length=32)"


@pytest.mark.parametrize("clean", ["none", "whitespace", "lower", "canonicalize", "siglip", "lowercase"])
def test_what_texts_go_through_can_be_said(tmp_path, clean):
    from open_clip import tokenizer as theirs
    from sentencepiece import SentencePieceProcessor

    path = folder(tmp_path, {"x.model": vocabularies.spm("xlmr")}) / "x.model"
    made = clipfast.Tokenizer.from_file(path, clean=clean, pad_id=0, context_length=10)
    spm = SentencePieceProcessor(model_proto=vocabularies.spm("xlmr"))
    clean_fn = {
        "none": str,
        "siglip": lambda text: re.sub(r"\s+", " ", theirs.canonicalize_text(text.replace("_", "☃")).replace("☃", "")),
        "lowercase": lambda text: "".join(character.lower() for character in text),
    }.get(clean) or theirs.get_clean_fn(clean)
    for text in ("Tom &amp; JERRY's  snake_case ", "café  ΣΑΣ", "a photo of a DOG!"):
        assert made.encode(text) == spm.encode(clean_fn(text)), text
    assert made.eos_id == 2


# --- the object -------------------------------------------------------------------------------------------

KINDS = {
    "siglip": {"x.model": vocabularies.spm, "name": "x.model"},
    "siglip2": {"tokenizer.json": vocabularies.gemma_json, "name": "tokenizer.json"},
}


@pytest.fixture(params=KINDS, scope="module")
def made(request, tmp_path_factory):
    files = dict(KINDS[request.param])
    name = files.pop("name")
    place = folder(tmp_path_factory.mktemp(request.param), {file: make() for file, make in files.items()})
    return clipfast.Tokenizer.from_file(place / name, context_length=16)


def test_called_as_clips_is(made):
    rows = made(["a dog", "", "two cats"])
    assert rows.shape == (3, 16)
    assert rows.dtype == torch.int64
    assert torch.equal(made("a dog"), rows[:1])
    assert torch.equal(made(text for text in ("a dog", "")), rows[:2])
    assert made([]).shape == (0, 16)
    assert made(["a dog"], context_length=5).shape == (1, 5)
    assert made(["a dog"], 40)[0, :16].tolist() == rows[0].tolist()
    assert rows[1].tolist() == [made.eos_id] + [made.pad_id] * 15
    assert made("dog " * 100)[0, -1] == made.eos_id
    assert made("dog " * 100)[0, :-1].tolist() == made.encode("dog " * 100)[:15]
    assert made.decode(made.encode("a photo of a dog")) == "a photo of a dog"
    assert "context_length=16" in repr(made)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts must be a str or a list of str, got NoneType"),
        (b"a", "texts must be a str or a list of str, got bytes"),
        (["a", 3], "texts[1] must be a str, got int"),
    ],
)
def test_what_is_no_text(made, texts, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        made(texts)
    with pytest.raises(TypeError, match="text must be a str, got list"):
        made.encode(["a"])
    with pytest.raises(ValueError, match=r"ids must lie in \[0, \d+\), got -1"):
        made.decode([-1])
    with pytest.raises(ValueError, match="context_length must be at least 1, got 0"):
        made("a", 0)
    with pytest.raises(TypeError, match="context_length must be an int, got float"):
        made("a", 7.0)


def test_pickles_and_forks(made):
    again = pickle.loads(pickle.dumps(made.fitted(16, made.vocab_size)))
    assert torch.equal(again(TEXTS), made(TEXTS))
    assert (repr(again), again.identity, again._limit) == (repr(made), made.identity, made.vocab_size)
    texts = [text for text in TEXTS if len(text) < 100] * 4
    expected = made(texts)
    loader = torch.utils.data.DataLoader(
        texts,
        batch_size=200,
        collate_fn=made,
        num_workers=1,
        multiprocessing_context=multiprocessing.get_context("fork"),
    )
    assert torch.equal(torch.cat(list(loader)), expected)


def test_tokens_that_a_model_lacks_are_refused(made):
    ids = made.encode("a photo of a dog")
    small = made.fitted(16, max(ids))
    with pytest.raises(ValueError, match=rf"texts\[1\]: got the token {max(ids)}, expected one below {max(ids)}"):
        small(["", "a photo of a dog"])


def test_saved_and_read_again(made, tmp_path):
    made.save(tmp_path)
    again = clipfast.Tokenizer.from_file(tmp_path)
    assert torch.equal(again(TEXTS), made(TEXTS))
    assert again.identity == made.identity
    assert clipfast.Tokenizer.from_file(tmp_path, context_length=7).context_length == 7
    with pytest.raises(ValueError, match="clean, pad_id, strip_sep_token: got none, None and None"):
        clipfast.Tokenizer.from_file(tmp_path, clean="none")
    facts = json.loads((tmp_path / "clipfast_tokenizer.json").read_text())
    folder(tmp_path, {"clipfast_tokenizer.json": facts | {"settings": {"cleanse": []}}})
    with pytest.raises(ValueError, match=r"clipfast_tokenizer\.json is damaged: .*cleanse"):
        clipfast.Tokenizer.from_file(tmp_path)


def test_identity_tells_files_and_settings_apart(tmp_path):
    places = [
        folder(tmp_path / name, {"x.model": vocabularies.spm(kind)}) for name, kind in (("a", "siglip"), ("b", "xlmr"))
    ]
    options = [{}, {"clean": "lower"}, {"pad_id": 0}, {"strip_sep_token": False}]
    made = [clipfast.Tokenizer.from_file(places[0], context_length=9, **kwargs).identity for kwargs in options]
    made.append(clipfast.Tokenizer.from_file(places[1], context_length=9, clean="siglip", pad_id=1).identity)
    assert made[0] == made[3]
    assert len({*made, clipfast.Tokenizer().identity}) == 5


# --- what is wrong ----------------------------------------------------------------------------------------

CLASS = "tokenizer_config.json"
WRONG = {
    "nothing there": ({}, {}, FileNotFoundError, "with 0 .model files, expected a tokenizer.json or one .model"),
    "two of them": ({"a.model": b"", "b.model": b""}, {}, FileNotFoundError, "with 2 .model files"),
    "no JSON": ({"tokenizer.json": "{"}, {}, ValueError, "tokenizer.json: got JSON that is no tokenizer of"),
    "other JSON": ({"tokenizer.json": "{}"}, {}, ValueError, "tokenizer.json: got JSON that is no tokenizer of"),
    "no model": ({"x.model": b"\n\x03abc"}, {}, ValueError, "x.model: got "),
    "nothing is known": ({"x.model": "xlmr"}, {}, ValueError, "x.model: clean: got none for a .model whose tokens are"),
    "no padding": ({"x.model": "xlmr"}, {"clean": "none"}, ValueError, "x.model: pad_id: got none"),
    "no context": (
        {"x.model": "xlmr"}, {"clean": "none", "pad_id": 0}, ValueError, "x.model: context_length: got none"
    ),
    "padding that is none": (
        {"x.model": "siglip"}, {"pad_id": 5000}, ValueError, "x.model: pad_id: got [5000], expected ids below"
    ),
    "no such cleaning": ({"x.model": "siglip"}, {"clean": "wash"}, ValueError, "clean: got 'wash', expected"),
    "no switch": ({"x.model": "siglip"}, {"strip_sep_token": 1}, ValueError, "strip_sep_token: got 1, expected True"),
    "no separator": (
        {"x.model": "siglip"}, {"strip_sep_token": True}, ValueError, "strip_sep_token: got True for a"
    ),
    "too short": (
        {"tokenizer.json": "bert"}, {"context_length": 1}, ValueError, "context_length must be at least 2, got 1"
    ),
    "fairseq's ids": ({"sentencepiece.bpe.model": "xlmr"}, {}, ValueError, "got fairseq's file without"),
    "another class": (
        {"x.model": "xlmr", CLASS: {"tokenizer_class": "NllbTokenizer"}}, {}, ValueError,
        "x.model: got a .model of NllbTokenizer, expected its tokenizer.json",
    ),
    "a class without its tokens": (
        {"x.model": "xlmr", CLASS: {"tokenizer_class": "GemmaTokenizer", "add_eos_token": True}}, {}, ValueError,
        "x.model: eos_token: got '<eos>', expected a token of the vocabulary",
    ),
    "both cases": (
        {"x.model": "siglip", CLASS: SIGLIP_CONFIG | {"do_lower_case": False}}, {}, ValueError,
        "got do_lower_case = false",
    ),
    "a configuration that is none": (
        {"x.model": "siglip", CLASS: "[]"}, {}, ValueError, "got list in"
    ),
    "open_clip's modes": (
        {"tokenizer.json": "bert", "open_clip_config.json": open_clip_config(tokenizer_mode="clips")}, {}, ValueError,
        "open_clip_config.json: got tokenizer_mode 'clips'",
    ),
    "open_clip's languages": (
        {"tokenizer.json": "bert", "open_clip_config.json": open_clip_config(tokenizer_kwargs={"language": "fra"})},
        {}, ValueError, "and tokenizer_kwargs {'language': 'fra'}, expected clean",
    ),
    "CLIP's with options": (
        {"open_clip_config.json": {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"clean": "canonicalize"}}}}}, {},
        ValueError, "got {'clean': 'canonicalize'} as tokenizer_kwargs of CLIP's own",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "options", "kind", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_right_is_refused(tmp_path, files, options, kind, message):
    known = {"siglip": vocabularies.spm, "xlmr": lambda: vocabularies.spm("xlmr"), "bert": vocabularies.bert_json}
    files = {
        name: known[content]() if content in ("siglip", "xlmr", "bert") else content for name, content in files.items()
    }
    with pytest.raises(kind, match=re.escape(message)):
        clipfast.Tokenizer.from_file(folder(tmp_path, files), **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer: got .*nothing\.json, expected a tokenizer\.json"):
        clipfast.Tokenizer.from_file(Path(tmp_path) / "nothing.json")
