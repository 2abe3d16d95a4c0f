"""The tokenizer against open_clip's: the same ids for any text, and errors where there is no text."""

from __future__ import annotations

import pickle
import random
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clipfast
from clipfast.data import tokenizer as module

AWKWARD = {
    "empty": "",
    "blank": " \t\n\r\f ",
    "contractions": "It's I'M we'Re THEY'LL he'D you'Ve don'T 'twas rock'n'roll ''s 'S",
    "long s": "'ſ ſtart Maſſachuſetts 'ſe <ſtart_of_text>",
    "digits": "1234567890 3.14 2nd x86_64 ½ ² Ⅷ ٣ ৪ ①",
    "emoji": "😀👍🏽 👩‍👩‍👧‍👦 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪 ❤️‍🔥 🤹🏾‍♀️",
    "cjk": "一只猫在桌子上。犬が走る 고양이가 잔다 ﾊﾝｶｸ ＦＵＬＬ　ＷＩＤＴＨ",
    "scripts": "Ὀδυσσεύς Привет שלום مرحبا नमस्ते สวัสดี ΣΊΣΥΦΟΣ İstanbul ǅ ﬁne Straße",
    "entities": "Tom &amp; Jerry &lt;b&gt; &amp;amp; &#39;s &#x1F600; &nbsp; &eacute; &notanentity; AT&T &lt",
    "markup": "<p>caf&eacute; &amp; bar</p>",
    "mojibake": "cafÃ© naÃ¯ve â€œquotedâ€\x9d itâ€™s Ã la mode \x85 \x93curly\x94",
    "quotes": "“curly” ‘single’ – — … « » „low“",
    "controls": "a\x00b\x07c\x0bd\x1ce\x1ff\x7fg\x85h\x1b[31mred\x1b[0m\ufeffi\u2028j",
    "invisible": "a\u200db\u200cc\u200ed\xade\u2060f\xa0g\u3000h\ufe0f",
    "combining": "e\u0301 n\u0303o a\u0345 \u0345 !\u0345! 1\u0345 Z\u0334\u0351\u036b\u0343a\u0335l\u0337g\u0336o",
    "surrogates": "\ud83d\ude00 \ud800 x\udfffy",
    "special tokens": "a<start_of_text>b <END_OF_TEXT> !<start_of_text> 1<end_of_text>'s<start_of_text><end_of_text>!",
    "symbols": "!!! ... #hash @you $9.99 100% a/b\\c [x] {y} ~`^ --flag http://a.b/c?d=e&f=g_h",
    "no blanks": "abcdefghijklmnopqrstuvwxyz" * 40,
    "300 words": "the quick brown fox jumps over the lazy dog's 2 bones, " * 30,
}


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()


@pytest.fixture(scope="module")
def ours():
    return clipfast.Tokenizer()


# --- the same tokens --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_awkward_texts(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


fragments = st.sampled_from(
    [
        *AWKWARD.values(),
        *"'ſſſΣς<>&;# \n\r\t\xa0\u0345\u0301\u200d\ufffdÃ™éﬁｱ가ΩKİ",
        *("'s", "’ll", "<start_of_text>", "<end_of_text>", "&amp;", "&lt;", "&#", "Â ", "â€", "\u1100\u1161"),
    ]
)


@settings(max_examples=1500, deadline=None)
@given(st.text())
def test_any_text(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


@settings(max_examples=1000, deadline=None)
@given(st.lists(fragments | st.text(max_size=4), max_size=8).map("".join))
def test_any_mixture(ours, theirs, text):
    assert ours.encode(text) == theirs.encode(text)


def test_every_character_is_split_alike(ours, theirs):
    """Letter, number, symbol or nothing: the neighbours of `a`, of each character, and of `!` say which."""
    characters = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    characters = [c for c in characters if not c.isspace()]
    printable = module._byte_alphabet()
    for start in range(0, len(characters), 1 << 16):
        text = " ".join(f"a{c}!" for c in characters[start : start + (1 << 16)])
        expected = ["".join(printable[byte] for byte in piece.encode()) for piece in theirs.pat.findall(text)]
        assert [piece for piece, _ in ours._tokens_of._split.pre_tokenize_str(text)] == expected


def captions(count: int) -> list[str]:
    """Captions of emoji in fourteen languages, in templates, now and then spoilt."""
    emoji = pytest.importorskip("emoji")
    languages = ["en", "es", "pt", "it", "fr", "de", "fa", "id", "zh", "ja", "ko", "ru", "tr", "ar"]
    for language in languages:
        emoji.config.load_language(language)
    named = [(symbol, entry) for symbol, entry in emoji.EMOJI_DATA.items() if "en" in entry]
    templates = [
        "a photo of a {}.",
        "{}",
        "{} AND {} {}",
        "Close-up of the {}'s {}, 4K &amp; HD",
        "It's “{}” – #{}!",
    ]
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        names = []
        for symbol, entry in rng.choices(named, k=3):
            name = entry.get(rng.choice(languages), entry["en"]).strip(":").replace("_", " ")
            names.append(rng.choice([name, name, name.upper(), symbol]))
        text = rng.choice(templates).format(*names)
        if rng.random() < 0.1:  # read with the wrong character set, as the web does
            text = text.encode("utf-8").decode(rng.choice(["latin-1", "cp1251"]), errors="replace")
        texts.append(text)
    return texts


def test_captions_in_many_languages(ours, theirs):
    texts = captions(20_000)
    assert sum(not text.isascii() for text in texts) > 5_000
    assert sum(text.isascii() for text in texts) > 1_000
    assert torch.equal(ours(texts), theirs(texts))


@pytest.mark.parametrize("length", [2, 3, 8, 40, 77, 300])
def test_padded_and_truncated(ours, theirs, length):
    texts = [*AWKWARD.values(), *captions(200)]
    tokens = ours(texts, context_length=length)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, theirs(texts, context_length=length))
    assert torch.equal(tokens, clipfast.Tokenizer(length)(texts))
    assert torch.equal(tokens, clipfast.tokenize(texts, length))
    assert (tokens == ours.eos_id).any(dim=1).all()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49407), max_size=30))
def test_decode(ours, theirs, ids):
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(torch.tensor(ids)) == theirs.decode(ids)


# --- without open_clip ------------------------------------------------------------------------------------


def test_known_ids(ours):
    """From the README of OpenAI's CLIP."""
    tokens = clipfast.tokenize(["a diagram", "a dog", "a cat"])
    assert tokens.shape == (3, 77)
    assert tokens[:, :5].tolist() == [
        [49406, 320, 22697, 49407, 0],
        [49406, 320, 1929, 49407, 0],
        [49406, 320, 2368, 49407, 0],
    ]
    assert not tokens[:, 5:].any()
    assert ours.decode(ours.encode("A Dog, e.g. 犬!")) == "a dog , e . g . 犬 ! "


def test_shapes(ours):
    assert ours("a dog").shape == (1, 77)
    assert ours([]).shape == (0, 77)
    assert ours(text for text in ("a", "b")).shape == (2, 77)
    assert torch.equal(ours(""), ours([" "]))
    assert ours("").flatten()[:3].tolist() == [ours.sot_id, ours.eos_id, 0]


def test_truncation_keeps_eos(ours):
    tokens = ours(AWKWARD["300 words"])
    assert tokens[0, -1] == ours.eos_id
    assert (tokens[0, :-1] != ours.eos_id).all()
    assert tokens[0, 1:-1].tolist() == ours.encode(AWKWARD["300 words"])[:75]


# --- processes and threads --------------------------------------------------------------------------------


def test_pickle():
    tokenizer = pickle.loads(pickle.dumps(clipfast.Tokenizer(16)))
    assert repr(tokenizer) == "Tokenizer(context_length=16)"
    assert torch.equal(tokenizer("a dog"), clipfast.tokenize("a dog", 16))


def test_threads_share_a_tokenizer():
    texts = captions(2000)
    expected = clipfast.Tokenizer()(texts)
    shared = clipfast.Tokenizer()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda part: shared(texts[part::8]), range(8)))
    for part, tokens in enumerate(results):
        assert torch.equal(tokens, expected[part::8])


def test_forked_workers_are_silent_and_right():
    """The Rust library warns in forked children once its threads have run: here they never do."""
    script = """
        import os
        import torch
        import clipfast

        os.environ.pop("TOKENIZERS_PARALLELISM", None)
        tokenizer = clipfast.Tokenizer()
        texts = [f"a photo of {n} dogs" for n in range(10_000)]
        tokens = tokenizer(texts)
        loader = torch.utils.data.DataLoader(
            texts, batch_size=2500, collate_fn=tokenizer, num_workers=2, multiprocessing_context="fork"
        )
        assert torch.equal(torch.cat(list(loader)), tokens)
        print("equal")
    """
    if sys.platform == "win32":
        pytest.skip("no fork")
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "equal\n", "")


def test_remembered_words_are_bounded(monkeypatch):
    monkeypatch.setattr(module._TokensOfWord, "MAX_WORDS", 10)
    tokenizer = clipfast.Tokenizer()
    texts = [f"word{n} {'x' * n}" for n in range(200)]
    assert torch.equal(tokenizer(texts), clipfast.tokenize(texts))
    assert len(tokenizer._tokens_of) == 10


# --- errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (None, "texts must be a str or a list of str, got NoneType"),
        (b"a dog", "texts must be a str or a list of str, got bytes"),
        (3, "texts must be a str or a list of str, got int"),
        ({"a": 1}, "texts must be a str or a list of str, got dict"),
        (["a", None], "texts[1] must be a str, got NoneType"),
        (["a", b"b"], "texts[1] must be a str, got bytes"),
        ([["a"], "b"], "texts[0] must be a str, got list"),
    ],
)
def test_what_is_not_text(ours, texts, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        ours(texts)


def test_encode_wants_one_text(ours):
    with pytest.raises(TypeError, match="text must be a str, got list"):
        ours.encode(["a"])


@pytest.mark.parametrize("length", [1, 0, -3])
def test_context_too_short(ours, length):
    message = rf"context_length must be at least 2 \(SOT and EOS\), got {length}"
    with pytest.raises(ValueError, match=message):
        ours("a", length)
    with pytest.raises(ValueError, match=message):
        clipfast.Tokenizer(length)


@pytest.mark.parametrize("length", [7.0, "77", True])
def test_context_of_wrong_type(ours, length):
    with pytest.raises(TypeError, match="context_length must be an int, got"):
        ours("a", length)


@pytest.mark.parametrize("index", [-1, 49408])
def test_decode_outside_the_vocabulary(ours, index):
    with pytest.raises(ValueError, match=rf"ids must lie in \[0, 49408\), got {index}"):
        ours.decode([320, index])
