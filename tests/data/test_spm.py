"""SentencePiece models without the library, against the library: the same ids and texts, for any text."""

from __future__ import annotations

import random

import pytest
import sentencepiece
import vocabularies

from clipfast.data.cleaning import without_surrogates
from clipfast.data.spm import Spm
from clipfast.data.spm_file import read_spm

OPTIONS = {
    "unigram as SigLIP's": {"kind": "siglip"},
    "folded case": {"kind": "xlmr", "normalization_rule_name": "nmt_nfkc_cf"},
    "bytes and symbols": {
        "kind": "xlmr",
        "vocab_size": 420,
        "byte_fallback": True,
        "user_defined_symbols": ("<sep>", "  ", "quick", "a▁b"),
        "character_coverage": 0.98,
    },
    "left as it is": {
        "kind": "xlmr",
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
    },
    "BPE as Gemma's": {"kind": "gemma"},
    "plain BPE": {"kind": "xlmr", "model_type": "bpe", "vocab_size": 150},
    "blanks behind words": {"kind": "xlmr", "treat_whitespace_as_suffix": True},
    "pieces over blanks": {"kind": "xlmr", "split_by_whitespace": False},
    "BPE over blanks": {
        "kind": "xlmr",
        "model_type": "bpe",
        "vocab_size": 150,
        "split_by_whitespace": False,
        "user_defined_symbols": ("quick b",),
    },
}


def repetitive(count: int) -> list[str]:
    """Texts that can be cut in many ways whose scores are equal, or differ by rounding alone."""
    rng = random.Random(2)
    parts = ["a", "aa", "b", "ab", "1", "11", "."]
    words = ["".join(rng.choice(parts) for _ in range(rng.choice([3, 8, 20]))) for _ in range(500)]
    return [" ".join(rng.choices(words, k=rng.choice([1, 5, 30]))) for _ in range(count)]


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def both(request):
    data = vocabularies.spm(**request.param)
    return Spm(read_spm(data)), sentencepiece.SentencePieceProcessor(model_proto=data)


def test_the_same_ids_and_texts(both):
    ours, theirs = both
    rng = random.Random(0)
    texts = [without_surrogates(text) for text in (*vocabularies.HARD, *vocabularies.texts(250), *repetitive(100))]
    for text in texts:
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(expected)
        ids = [rng.randrange(len(ours.file.pieces)) for _ in range(rng.choice([0, 1, 4, 9]))]
        assert ours.decode(ids) == theirs.decode(ids)
    special = (ours.file.sot_id, ours.file.eos_id, ours.file.pad_id)
    assert [-1 if i is None else i for i in special] == [theirs.bos_id(), theirs.eos_id(), theirs.pad_id()]
    assert ours.file.unk_id == theirs.unk_id()


def test_equal_scores_are_added_up_again_in_float32(monkeypatch):
    """Cutting words one by one in float64 is not enough: without the second look some of these differ."""
    data = vocabularies.spm("siglip")
    theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
    texts = repetitive(400)
    expected = [theirs.encode(text) for text in texts]
    ours = Spm(read_spm(data))
    assert [*map(ours.encode, texts)] == expected
    monkeypatch.setattr(Spm, "_certain", lambda self, words, cut: cut)
    assert [*map(ours.encode, texts)] != expected


def test_remembered_words_are_bounded_and_change_nothing(monkeypatch):
    data = vocabularies.spm("siglip")
    texts = [without_surrogates(text) for text in vocabularies.texts(50)]
    expected = [*map(Spm(read_spm(data)).encode, texts)]
    monkeypatch.setattr(Spm, "MAX_WORDS", 5)
    ours = Spm(read_spm(data))
    assert [ours.encode(text) for text in texts] == expected
    assert len(ours._words) == 5


def test_files_that_are_no_models():
    data = vocabularies.spm("siglip")
    for wrong in (b"", b"\x00", b"hello", data[:-1], data[: len(data) // 2], data[:7], b"\xff" * 40, b"\x08\x01"):
        with pytest.raises(ValueError, match="got "):
            read_spm(wrong)
    rng = random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        for _ in range(5):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            model = Spm(read_spm(bytes(damaged)))
        except ValueError:
            continue
        model.encode("a photo of a dog")  # a damaged score or letter cannot be told from a right one


@pytest.mark.parametrize("kind", ["word", "char"])
def test_types_that_are_not_served(kind):
    with pytest.raises(ValueError, match=f"got a model of type {kind}, expected unigram or bpe"):
        read_spm(vocabularies.spm("xlmr", model_type=kind, vocab_size=60))
