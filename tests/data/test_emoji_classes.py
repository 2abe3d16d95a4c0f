from __future__ import annotations

import numpy as np

from clipfast.data.composition import parse_caption
from clipfast.data.emoji_classes import zero_shot_questions
from clipfast.data.emoji_pairs import EmojiPairs

PEOPLE, ACTS = ("woman", "man", "person"), ("juggling", "cook")
TONES = ("light skin tone", "medium skin tone", "dark skin tone")


def pairs() -> EmojiPairs:
    captions = [f"{who} {act} {tone}" for who in PEOPLE for act in ACTS for tone in TONES]
    captions += ["tiger", "red circle", "blue circle", "women wrestling", "kiss woman man", "woman dark skin tone"]
    captions += ["handshake light skin tone dark skin tone", "handshake"]
    return EmojiPairs(
        pictures=np.zeros((len(captions), 8, 8, 3), np.uint8),
        captions=captions,
        categories=[parse_caption(caption).base for caption in captions],
        held_out=np.arange(len(captions)) % 2 == 1,
    )


def test_questions_and_their_answers():
    emoji = pairs()
    category, person, tone = zero_shot_questions(emoji)
    assert category.class_names == ["circle", "cook", "handshake", "juggling"]
    assert person.class_names == list(PEOPLE)
    assert [question.name for question in (category, person, tone)] == ["category", "person", "skin tone"]
    assert len(tone.class_names) == 5
    for question in (category, person, tone):
        assert set(question.indices) <= set(emoji.held_out_indices)
        for index, label in zip(question.indices, question.labels, strict=True):
            assert question.class_names[label] in emoji.captions[index]
    # "red circle", "women wrestling", "woman dark skin tone" and "handshake" are held out beside people
    held_out = [emoji.captions[i] for i in emoji.held_out_indices]
    assert {"red circle", "women wrestling", "woman dark skin tone", "handshake"} < set(held_out)
    asked = [{emoji.captions[i] for i in question.indices} for question in (category, person, tone)]
    assert {"red circle", "handshake"} < asked[0]
    assert not {"women wrestling", "woman dark skin tone"} & asked[0]
    assert "woman dark skin tone" in asked[1] & asked[2]
    assert not {"red circle", "women wrestling", "handshake"} & (asked[1] | asked[2])


def test_prompts_read_like_captions():
    emoji = pairs()
    category, person, tone = zero_shot_questions(emoji)
    prompts = [{t.replace("{}", c) for t in q.templates for c in q.class_names} for q in (category, person, tone)]
    for asked in prompts:
        assert "woman juggling dark skin tone" in asked
        assert not any("{}" in prompt or "  " in prompt or prompt != prompt.strip() for prompt in asked)
    assert all(template.count("{}") == 1 for q in (category, person, tone) for template in q.templates)
    # a template must not give the answer away
    assert not any(who in template for who in PEOPLE for template in person.templates)
    assert not any("skin tone" in template for template in tone.templates)
