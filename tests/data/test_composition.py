from __future__ import annotations

import numpy as np
import pytest

from clipfast.data.composition import hold_out_compositions, parse_caption

TONES = ["light skin tone", "medium skin tone", "dark skin tone"]
GRID = [f"{who} {act} {tone}" for who in ("man", "woman") for act in ("juggling", "cook") for tone in TONES]


@pytest.mark.parametrize(
    ("caption", "base", "parts"),
    [
        (
            "woman juggling medium-dark skin tone",
            "juggling",
            ("juggling", "medium-dark skin tone", "woman"),
        ),
        ("pinching hand light skin tone", "pinching hand", ("light skin tone", "pinching hand")),
        (
            "kiss woman man dark skin tone light skin tone",
            "kiss",
            ("dark skin tone", "kiss", "light skin tone", "man", "woman"),
        ),
        ("person walking facing right", "walking", ("facing right", "person", "walking")),
        ("red circle", "circle", ("circle", "red")),
        ("woman dark skin tone", "", ("dark skin tone", "woman")),
        ("fireman's hose", "fireman's hose", ("fireman's hose",)),
        ("man's shoe", "man's shoe", ("man's shoe",)),
        ("Togo", "togo", ("togo",)),
    ],
)
def test_parse_caption(caption, base, parts):
    assert parse_caption(caption).base == base
    assert parse_caption(caption).parts == parts


def test_parts_hold_every_word():
    for caption in (*GRID, "woman and man holding hands medium-light skin tone dark skin tone", "green book"):
        words = sorted(" ".join(parse_caption(caption).parts).split())
        assert words == sorted(caption.lower().split())


def test_order_of_parts_makes_no_new_composition():
    one, other = "handshake dark skin tone light skin tone", "handshake light skin tone dark skin tone"
    assert parse_caption(one).parts == parse_caption(other).parts
    assert parse_caption(one).parts != parse_caption("handshake dark skin tone dark skin tone").parts


def test_parts_stay_in_training_and_combinations_do_not():
    captions = [*GRID, "tiger", "Togo", "handshake light skin tone dark skin tone"]
    captions += ["handshake dark skin tone light skin tone", "handshake medium skin tone dark skin tone"]
    for seed in range(20):
        held_out = hold_out_compositions(captions, 0.25, seed)
        training = [parse_caption(c).parts for c, out in zip(captions, held_out, strict=True) if not out]
        known = {part for parts in training for part in parts}
        for caption, out in zip(captions, held_out, strict=True):
            if out:
                parts = parse_caption(caption).parts
                assert len(parts) >= 2
                assert parts not in training
                assert set(parts) <= known
        # the two orders of one composition are on the same side
        assert held_out[-3] == held_out[-2]
        assert 0.9 * 0.25 * len(captions) <= held_out.sum() <= round(0.25 * len(captions))


def test_the_only_caption_with_a_part_stays():
    held_out = [hold_out_compositions([*GRID, "woman juggling pale skin"], 0.5, seed)[-1] for seed in range(20)]
    assert not any(held_out)


def test_seed_decides():
    first = hold_out_compositions(GRID, 0.25, 0)
    assert np.array_equal(first, hold_out_compositions(GRID, 0.25, 0))
    assert any(not np.array_equal(first, hold_out_compositions(GRID, 0.25, seed)) for seed in range(1, 6))


def test_errors():
    with pytest.raises(ValueError, match=r"fraction: got 1.0, expected"):
        hold_out_compositions(GRID, 1.0)
    with pytest.raises(ValueError, match="only 0 are combinations"):
        hold_out_compositions(["tiger", "Togo", "red circle"], 0.5)
