"""Tiny vocabularies of the kinds that models use, trained on the spot, and folders as models' authors leave them."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

_WORDS = ("dog", "cat", "photo", "bird", "sitt", "runn", "large", "small", "quick", "brown", "jump", "fence", "river")
_LINES = (
    "a photo of a dog", "two cats on the mat", "it's the 2nd naïve café, déjà vu!", "一只猫在桌子上",
    "한국어 고양이 한", "привет мир", "1234567890 3.14", "aaaa aaa aa a bbb abab ababab", "http://a.b/c?d=e&f=g_h",
    "<b>bold</b> [x] ½ ② ｶﾞ",
)  # fmt: skip

HARD = (
    "", " ", " \t\n", "A photo of a DOG.", "  two   spaces ", "!?.,", "- hello", " lead", "trail ", "snake_case_name",
    "İstanbul ΣΊΣΥΦΟΣ Straße", "e\u0301 é \u1112\u1161\u11ab 한", "ﬁne Ⅷ ½ ② ｶﾞ Ａ", "😀👍🏽 👩‍👩‍👧‍👦 🇩🇪",
    "a\x00b\x07c\x0bd\x1ce\x7ff\x85g\ufeffh\u2028i\xadj\u200bk", "\ud83d\ude00 \ud800 x\udfffy", "猫猫 猫 ☃☃ ☃",
    "a</s>b", "a </s> b <unk>c", "</s>", "<pad><bos><eos>x", "[CLS] a [SEP] b [MASK]", "▁a▁▁b ▁", "aaaaaaaaaaaaaaaaaaa",
    "Tom &amp; Jerry &lt;b&gt;", "cafÃ© â€œquotedâ€\x9d", "it’s “curly”", "the quick brown dog's 2 jumps, " * 40,
    "x" * 3000, "😀" * 500, "a " * 3000,
)  # fmt: skip


def texts(count: int, seed: int = 0) -> list[str]:
    """Return texts of words, fragments and any characters."""
    rng = random.Random(seed)
    fragments = [*_WORDS, *_LINES, *HARD[3:25], "a", "aa", "▁", " ", "\u0301", "'s", "<unk>"]

    def one() -> str:
        if rng.random() < 0.8:
            return rng.choice(fragments) + rng.choice(["", " ", " ", "ing "])
        return chr(rng.choice([rng.randrange(1, 127), rng.randrange(0xA0, 0xD800), rng.randrange(0xE000, 0x20000)]))

    return ["".join(one() for _ in range(rng.choice([1, 2, 5, 12, 40]))) for _ in range(count)]


def corpus() -> list[str]:
    """Return the lines that vocabularies are made of."""
    rng = random.Random(1)
    made = [" ".join(rng.choice(_WORDS) + rng.choice(["", "s", "ing", "ed"]) for _ in range(8)) for _ in range(60)]
    return [*_LINES, *made] * 20


@cache
def spm(kind: str = "siglip", **changed: object) -> bytes:
    """Train a SentencePiece model: ``siglip`` (T5's special tokens), ``gemma``, ``xlmr``; or with other options."""
    import sentencepiece

    options = {
        "siglip": {"model_type": "unigram", "vocab_size": 300, "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "gemma": {
            "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False, "add_dummy_prefix": False, "split_digits": True,
            "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>",
            "bos_piece": "<bos>", "user_defined_symbols": ["<mask>", "▁▁", "▁▁▁"],
        },
        "xlmr": {"model_type": "unigram", "vocab_size": 280},
    }[kind] | changed  # fmt: skip
    if options["model_type"] == "unigram":
        options["hard_vocab_limit"] = False
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=written, num_threads=1, minloglevel=5, **options
    )
    return written.getvalue()


@cache
def gemma_json() -> str:
    """Train what Gemma's ``tokenizer.json`` is: BPE with bytes, and the special tokens of SigLIP 2."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    more = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    made.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=600, special_tokens=more, show_progress=False))
    values = json.loads(made.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in specials]
    made = tokenizers.Tokenizer.from_str(json.dumps(values))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="$A <eos>", pair=None, special_tokens=[("<eos>", 1)])
    return made.to_str()


@cache
def bert_json() -> str:
    """Train what ``bert-base-uncased`` has."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=specials, show_progress=False)
    )
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made.to_str()


def folder(path: Path, files: dict[str, str | bytes | dict]) -> Path:
    """Write files: texts, bytes, or JSON."""
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps(content)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


SIGLIP_CONFIG = {
    "tokenizer_class": "SiglipTokenizer", "model_max_length": 64, "do_lower_case": True,
    "processor_class": "SiglipProcessor", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
}  # fmt: skip
SIGLIP2_CONFIG = {
    "tokenizer_class": "Siglip2Tokenizer", "model_max_length": 64, "padding_side": "right", "add_bos_token": False,
    "add_eos_token": True, "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>",
    "mask_token": "<mask>",
}  # fmt: skip
