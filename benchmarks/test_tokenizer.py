"""Texts a second of the tokenizer, beside open_clip's and the Rust library's own batches on all cores.

    pytest benchmarks/test_tokenizer.py

open_clip's tokenizer and ours each run on one core. The Rust library does less here: it cleans nothing, pads
nothing, and its ids are left as lists. Ids are compared before anything is timed, and every tokenizer has seen the
texts once.
"""

from __future__ import annotations

import importlib.util
import os
import random
from pathlib import Path

import pytest
import tokenizers
import torch
from harness import by_scale, measure

import clipfast
from clipfast.benchmark.results import Row
from clipfast.data import tokenizer as module
from clipfast.data.cleaning import clean_words

TEXTS = by_scale(smoke=500, short=5_000, full=20_000)
FOREIGN = ["café", "naïve", "“quoted”", "– 50 %", "犬が走る", "一只猫", "кошка", "😀", "👩‍🚀", "T&amp;J"]


def captions(foreign_share: float) -> list[str]:
    """Texts of 4 to 16 of CLIP's own words, drawn as words are (the n-th in proportion to 1/n)."""
    rng = random.Random(0)
    words = [token[:-4] for token in module._vocabulary()[0] if token.endswith("</w>") and token[:-4].isalpha()]
    words = [word for word in words if word.isascii() and len(word) > 2]
    frequencies = [1 / rank for rank in range(10, len(words) + 10)]
    texts = []
    for _ in range(TEXTS):
        chosen = rng.choices(words, frequencies, k=rng.randint(4, 16))
        if rng.random() < foreign_share:
            chosen.insert(rng.randrange(len(chosen)), rng.choice(FOREIGN))
        texts.append(" ".join(chosen).capitalize() + rng.choice(["", ".", ", 2 of 10!"]))
    return texts


def open_clips_tokenizer():
    """From its file alone: importing open_clip would want torchvision."""
    package = importlib.util.find_spec("open_clip")
    if package is None:
        return "not installed"
    path = Path(package.origin).with_name("tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    rival = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rival)
    os.environ.pop("TOKENIZERS_PARALLELISM", None)  # it switches the Rust library's threads off
    return rival.SimpleTokenizer()


def rust_librarys_tokenizer():
    """CLIP's pipeline as the Rust library would run it, texts in and ids out."""
    ours = clipfast.Tokenizer()._tokens_of
    rust = tokenizers.Tokenizer(ours._bpe)
    rust.pre_tokenizer = ours._split
    return lambda texts: [row.ids for row in rust.encode_batch_fast(texts, add_special_tokens=False)]


@pytest.mark.parametrize("foreign_share", [0.0, 0.1, 1.0], ids=["ASCII", "one in ten not ASCII", "none ASCII"])
def test_tokenizer(foreign_share, benchmark):
    texts = captions(foreign_share)
    clean = [" ".join(clean_words(text)) for text in texts]
    theirs, rust, ours = open_clips_tokenizer(), rust_librarys_tokenizer(), clipfast.Tokenizer()
    ids = ours(texts)
    if not isinstance(theirs, str):
        assert torch.equal(ids, theirs(texts))
    assert rust(clean) == [ours.encode(text) for text in texts]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sides = {
        "clipfast": lambda: ours(texts),
        "open_clip": theirs if isinstance(theirs, str) else lambda: theirs(texts),
        f"the Rust library alone, {cores} cores": lambda: rust(clean),
    }
    share = {0.0: "ASCII", 0.1: "one in ten not ASCII", 1.0: "none ASCII"}[foreign_share]
    row = Row(
        op="tokenizer",
        name=f"tokenizer, {TEXTS} texts of {ids.count_nonzero() / TEXTS:.1f} tokens, {share}",
        label=share,
        direction="forward",
        dtype="int64",
        unit="texts",
        items=TEXTS,
    )
    measure(benchmark, row, sides)
