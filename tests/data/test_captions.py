"""Which captions a picture has, and which of them a step takes."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from samples import png, write_tar

from clipfast.data.batches import Batch, Shares, training_batches
from clipfast.data.captions import captions_of_text, captions_of_value, draw_caption
from clipfast.data.options import DataOptions
from clipfast.data.pairs import Captions, PairError
from clipfast.data.sources import open_pairs
from clipfast.data.tokenizer import Tokenizer
from clipfast.data.transform import image_transform
from clipfast.embed.reader import open_inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("one", ("one",)),
        ("one\ntwo\r\n\n \nthree\n", ("one", "two", "three")),
        ("one\u2028still one\x0cstill\x85\nNone\n0", ("one\u2028still one\x0cstill\x85", "None", "0")),
        (" \n\r\n", ("",)),
        ("", ("",)),
    ],
)
def test_lines_are_captions(text, texts):
    assert captions_of_text(text) == Captions(texts)


def test_they_are_clip_benchmarks():
    """It calls ``str.splitlines`` on a sample's ``.txt``."""
    text = "A dog.\nA brown dog, running\r\nDogs\n"
    assert list(captions_of_text(text).texts) == text.splitlines()


@pytest.mark.parametrize(
    ("value", "texts", "unusable"),
    [
        ("a\nb", ["a\nb"], []),
        (["a", "b"], ["a", "b"], []),
        (["a", None, 7, "", "  ", True, ["b"], {"x": 1}, "c"], ["a", "c"], [2, 3, 4, 5, 6, 7, 8]),
        ([{"raw": "a", "tokens": ["a"]}, {"caption": "b"}, {"raw": None}], ["a", "b"], [3]),
        ({"raw": ["a", "b"]}, ["a", "b"], []),
    ],
)
def test_values(value, texts, unusable):
    found = captions_of_value(value)
    assert list(found.texts) == texts
    assert [which for which, _ in found.unusable] == [f"caption {number}" for number in unusable]
    assert "None" not in " ".join(found.texts)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "caption: got null"),
        (3.5, "got the number 3.5"),
        (False, "got false"),
        ([], "got no entries"),
        ([None, 1], "got null, the number 1"),
        ({"x": "a"}, "got an object"),
    ],
)
def test_what_is_no_text_never_becomes_words(value, message):
    with pytest.raises(PairError, match=message):
        captions_of_value(value)


def shard_of(folder, *samples: dict[str, bytes]):
    return write_tar(folder, [(f"{i}.{kind}", data) for i, s in enumerate(samples) for kind, data in s.items()])


def test_keys_of_shards(tmp_path):
    fields = {"caption": ["a", None], "meta": {"title": "deep"}, "alt.text": "dotted", "text": 5}
    path = shard_of(
        tmp_path / "0.tar",
        {
            "small.jpg": png(0),
            "png": png(1),
            "txt": b"plain",
            "en.txt": b"one\ntwo",
            "json": json.dumps(fields).encode(),
        },
    )

    def captions(key: str | None) -> tuple[str, ...]:
        return open_pairs(path, DataOptions(caption_key=key)).captions(0).texts

    assert captions(None) == ("plain",)
    assert captions("en.txt") == captions(".EN.txt") == captions("de.txt;en.txt") == ("one", "two")
    assert captions("caption") == ("a",)
    assert captions("meta.title") == ("deep",)
    assert captions("alt.text") == ("dotted",)
    assert open_pairs(path, DataOptions(image_key="small.jpg")).image(0) == png(0)
    assert open_pairs(path, DataOptions(image_key="webp; png")).image(0) == png(1)
    with pytest.raises(PairError, match="json: got caption, meta, alt.text, text, expected the field nothing"):
        captions("nothing")
    with pytest.raises(PairError, match="text: got the number 5"):
        captions("text")
    with pytest.raises(PairError, match=r"expected a picture \(webp\)"):
        open_pairs(path, DataOptions(image_key="webp")).image(0)
    with pytest.raises(ValueError, match="caption_key: got ' ', expected a name"):
        DataOptions(caption_key=" ")


def test_a_json_may_be_the_captions(tmp_path):
    source = open_pairs(shard_of(tmp_path / "0.tar", {"png": png(0), "json": b'["one", null, "two"]'}))
    assert source.captions(0).texts == ("one", "two")
    source = open_pairs(shard_of(tmp_path / "1.tar", {"png": png(0), "json": b'{"TEXT": "one", "url": "x"}'}))
    assert source.captions(0).texts == ("one",)


@pytest.mark.parametrize("text", [b"{", b"[1, 2]", b"null", b"[" * 100_000, b"\xff", b"3"])
def test_a_json_that_is_none_is_an_error_of_its_sample(tmp_path, text):
    source = open_pairs(shard_of(tmp_path / "0.tar", {"png": png(0), "json": text}))
    with pytest.raises(PairError, match=r"0\.tar/0: "):
        source.read(0)


# --- what a step takes ------------------------------------------------------------------------------------


def test_a_draw_is_of_seed_epoch_and_sample():
    turns = [[draw_caption(5, 1, epoch, index) for epoch in range(10)] for index in range(200)]
    # each caption has its turn before one comes again
    assert all(sorted(turn[:5]) == sorted(turn[5:]) == list(range(5)) for turn in turns)
    firsts = Counter(turn[0] for turn in turns)
    assert all(20 <= firsts[number] <= 60 for number in range(5))
    assert len({tuple(turn) for turn in turns}) > 150
    assert turns[3] != [draw_caption(5, 2, epoch, 3) for epoch in range(10)]
    assert draw_caption(1, 0, 0, 0) == 0


COUNT = 24


@pytest.fixture
def many(tmp_path):
    """Shards of 24 pictures with five captions each: ``100 i + j``."""
    for shard in range(2):
        samples = [
            {"png": png(i), "txt": "\n".join(str(1000 + 10 * i + j) for j in range(5)).encode()}
            for i in range(12 * shard, 12 * shard + 12)
        ]
        shard_of(tmp_path / "s" / f"{shard}.tar", *samples)
    return tmp_path / "s"


def batches(path, rank=0, world=1, first=0, last=30, workers=0, size=8, **options) -> list[Batch]:
    return list(
        training_batches(
            open_pairs(path),
            image_transform(8, train=True),
            Tokenizer(context_length=8),
            Shares(size, rank, world),
            seed=5,
            first_step=first,
            last_step=last,
            workers=workers,
            **options,
        )
    )


def numbers(some: list[Batch]) -> list[int]:
    tokenizer = Tokenizer(context_length=8)
    return [int("".join(c for c in tokenizer.decode(row) if c.isdigit())) for batch in some for row in batch.tokens]


def test_training_takes_each_caption_in_its_turn(many):
    whole = numbers(batches(many))
    epochs = [whole[first : first + COUNT] for first in range(0, len(whole), COUNT)]
    assert len(epochs) == 10
    for epoch in epochs:
        assert sorted((number - 1000) // 10 for number in epoch) == list(range(COUNT))
    # after five epochs all captions of all pictures were taken, and again after ten
    assert Counter(whole) == {1000 + 10 * i + j: 2 for i in range(COUNT) for j in range(5)}
    # the captions of an epoch are not those of one line
    assert len(Counter(number % 10 for number in epochs[0])) > 2
    # batches of another size, ranks, and a run that goes on see the same
    assert numbers(batches(many, size=12, last=20)) == whole
    parts = [batches(many, rank, 2, last=6) for rank in range(2)]
    assert numbers([b for step in zip(*parts, strict=True) for b in step]) == whole[: 6 * 8]
    assert numbers(batches(many, first=13)) == whole[13 * 8 :]


@pytest.mark.slow
def test_workers_take_the_same(many):
    some, others = batches(many, last=6), batches(many, last=6, workers=2)
    assert all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.images, b.images) for a, b in zip(some, others, strict=True)
    )


def test_losses_are_counted_and_named(tmp_path):
    captions = [None, 3, "", ["1002", None], [], "1005", {"x": 1}]
    shard_of(
        tmp_path / "0.tar",
        *({"png": png(i), "json": json.dumps({"caption": c}).encode()} for i, c in enumerate(captions)),
    )
    some = batches(tmp_path, last=7, size=2)
    assert set(numbers(some)) == {1002, 1005}
    skipped = [entry for batch in some for entry in batch.skipped]
    words = " ".join(f"{key}: {reason}" for key, reason in skipped)
    for reason in ("got null", "the number 3", "caption is empty", "got no entries", "got an object"):
        assert reason in words
    assert "0.tar/3, caption 2: got null" in words
    # texts to embed: a row for each caption, the others named
    inputs = open_inputs(tmp_path, "text")
    assert len(inputs) == 8
    read = {}
    for row in range(len(inputs)):
        try:
            read[row] = inputs.read(row)
        except PairError as error:
            read[row] = str(error)
    assert [text for text in read.values() if text.isdigit()] == ["1002", "1005"]
    assert read[4] == "0.tar/3, caption 2: got null, expected a text"


def test_texts_to_embed_are_captions(many, tmp_path):
    inputs = open_inputs(many, "text")
    assert [inputs.read(row) for row in range(len(inputs))] == [
        str(1000 + 10 * i + j) for i in range(COUNT) for j in range(5)
    ]
    assert inputs.name(7) == "1012"
    # the counts come from the cache now
    assert len(open_inputs(many, "text")) == 5 * COUNT
    shard_of(many / "1.tar", {"png": png(0), "txt": b"alone"})
    assert len(open_inputs(many, "text")) == 5 * 12 + 1
    assert open_inputs(many, "text").fingerprint() != inputs.fingerprint()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "f" / "b.txt").write_text("three")
    inputs = open_inputs(tmp_path / "f", "text")
    assert [(inputs.read(row), inputs.name(row)) for row in range(3)] == [
        ("one", "a.txt"),
        ("two", "a.txt:2"),
        ("three", "b.txt"),
    ]
