"""The shortcuts around ftfy are exact."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator

import ftfy
import pytest
from ftfy.badness import BADNESS_RE
from ftfy.chardata import UTF8_DETECTOR_RE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipfast.data import cleaning

try:
    from re import _parser as parser
except ImportError:  # Python 3.10
    import sre_parse as parser


def cleaned_the_long_way(text: str) -> list[str]:
    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).strip().split()).lower().split()


mojibake = st.text(
    "aZ .,?!'&;<#1ÃÂâàÐÑГРВвОЂã€™œ“”’‘\x9d\x80\x85\xa0\xad¤¥©éñüøßŠžŒ„…–½Ωλжяα√≈∞╗ðŸ\ufffd\n\r犬😀\u200dﬁＫ！",
    max_size=12,
)
_PARTS = "&amp; &AMP; &ouml; &#39; &#x27; &amp;#39; &lt; < &gt &copy &nosuch; & ; # “ é ô a 1 &ldquo; ＆ amp;"
entities = st.lists(st.sampled_from(_PARTS.split()), max_size=6).map("".join)
almost_clean = st.text(st.characters(codec="ascii"), max_size=12) | mojibake | entities | st.text(max_size=8)


@settings(max_examples=6000, deadline=None)
@given(almost_clean)
@example("a\x1cb")
@example("x\nÂ y")
@example("&#9;a &amp;#x41;")
@example("Ｋ Å ﬁ e\u0301 \u1100\u1161")
@example("T&amp;amp;amp;amp;J")
@example("＆amp；lt;b")
@example("\u200d\ufeff“\u0301")
@example("\ud83d\ude00")
def test_cleaning(text):
    assert cleaning.clean_words(text) == cleaned_the_long_way(text)


@settings(max_examples=2000, deadline=None)
@given(mojibake | entities)
def test_a_quick_fix_is_ftfys(text):
    fixed = cleaning._quick_fix(text)
    assert fixed is None or fixed == ftfy.fix_text(text)


@pytest.mark.parametrize("around", ["a{}b", "x {} y", "é{}", "{}é"])
def test_every_character(around):
    for code in itertools.chain(range(0x600), range(0x1E00, 0x2700), range(0xF900, 0x10000, 3)):
        text = around.format(chr(code))
        fixed = cleaning._quick_fix(text)
        assert fixed is None or fixed == ftfy.fix_text(text), ascii(text)


ORDINARY = ("a caption of a café", "“quoted”", "T&amp;J", "R & D", "– 50 %", "кошка", "👩\u200d🚀", "ﬁsh Ｋ", "naïve")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_captions_do_without_ftfy(text, monkeypatch):
    expected = cleaned_the_long_way(text)
    cleaning.clean_words(text)  # its characters are known from here on

    def refuse(*_: object) -> None:
        raise AssertionError(text)

    monkeypatch.setattr(ftfy, "fix_text", refuse)
    monkeypatch.setattr(cleaning, "is_bad", refuse)
    assert cleaning.clean_words(text) == expected


# --- what the shortcut for mojibake was read from ---------------------------------------------------------

Set = frozenset[str] | None  # None: not only characters that are named


def sequences(items: list) -> Iterator[list[Set]]:
    """The characters that each place of each alternative of a parsed expression may hold."""
    if not items:
        yield []
        return
    (kind, value), rest = items[0], items[1:]
    kind = str(kind)
    if kind == "BRANCH":
        heads = itertools.chain.from_iterable(sequences(list(branch)) for branch in value[1])
    elif kind == "MAX_REPEAT":
        low, high, body = value
        assert (low, high) == (0, 1), value
        heads = itertools.chain([[]], sequences(list(body)))
    elif kind == "LITERAL":
        heads = [[frozenset(chr(value))]]
    elif kind == "IN":
        heads = [[named(value)]]
    elif kind in ("ANY", "NOT_LITERAL"):
        heads = [[None]]
    else:
        assert kind == "AT", kind
        heads = [[]]
    for head in heads:
        for tail in sequences(rest):
            yield head + tail


def named(members: list) -> Set:
    found: set[str] = set()
    for kind, value in members:
        if str(kind) == "LITERAL":
            found.add(chr(value))
        elif str(kind) == "RANGE":
            found |= set(map(chr, range(value[0], value[1] + 1)))
        else:
            return None
    return frozenset(found)


def test_every_alternative_of_ftfys_needs_what_is_looked_for():
    eight_bit = re.compile(f"[{cleaning._8_BIT}]+").fullmatch
    alone = re.compile(f"[{cleaning._ALONE}]+").fullmatch
    ordinary = re.compile(f"[{cleaning._ORDINARY}]").search

    def told(places: list[Set]) -> bool:
        texts = ["".join(sorted(p)) if p else "" for p in places]
        pairs = itertools.pairwise(texts)
        return any(map(alone, texts)) or any(
            eight_bit(x) and eight_bit(y) and not (ordinary(x) and ordinary(y)) for x, y in pairs
        )

    every = list(sequences(list(parser.parse(BADNESS_RE.pattern, BADNESS_RE.flags))))
    assert len(every) > 30
    assert [places for places in every if not told(places)] == []
    assert cleaning._is_known(), "ftfy's expression is another: see that the constants hold, then change _KNOWN"


def test_another_expression_of_ftfys_is_asked_itself(monkeypatch):
    monkeypatch.setattr(cleaning, "_is_known", lambda: False)
    asked = []
    monkeypatch.setattr(cleaning, "is_bad", lambda text: asked.append(text) or False)
    cleaning.clean_words("a café")
    assert asked == ["a café"]


def test_mojibake_is_made_of_8bit_characters():
    """The characters that ftfy's heuristics name, all of them, are among those that we ask it about."""
    named = {c for pattern in (BADNESS_RE, UTF8_DETECTOR_RE) for c in pattern.pattern if not c.isascii()}
    assert len(named) > 200
    assert all(re.match(f"[{cleaning._8_BIT}]", c) for c in named)
