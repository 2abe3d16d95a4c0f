"""Questions about an emoji that a model can be asked in words: what is it about, who is it, which tone?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from clipfast.data.composition import SKIN_TONES, Composition, parse_caption
from clipfast.data.emoji_pairs import EmojiPairs

_PEOPLE = ("woman", "man", "person")
_TONES = tuple(f"{tone} skin tone" for tone in SKIN_TONES)


@dataclass(frozen=True)
class ZeroShotQuestion:
    """A zero-shot classification task on the held-out pairs.

    Attributes:
        name: "category", "person" or "skin tone".
        class_names: C names, made of words that captions use.
        templates: Prompts with a ``{}`` for the name.
        indices: int64 ``[n]``, the held-out pairs that have an answer.
        labels: int64 ``[n]``, indices of their classes.
    """

    name: str
    class_names: list[str]
    templates: list[str]
    indices: np.ndarray
    labels: np.ndarray


def zero_shot_questions(pairs: EmojiPairs) -> list[ZeroShotQuestion]:
    """Ask three things of the held-out pictures: category, person and skin tone.

    The categories are all those of two pairs or more, not only those held out. The prompts are built from parts that
    captions have ("woman {} dark skin tone"), as prompts for photographs are built from what alt texts say.
    """
    compositions = [parse_caption(caption) for caption in pairs.captions]
    used = Counter(category for category in pairs.categories if category)
    categories = sorted(category for category, count in used.items() if count >= 2)
    # what women, men and people are all drawn doing
    drawn = {(c.base, c.subjects) for c in compositions}
    acts = [act for act in categories if all((act, (person,)) in drawn for person in _PEOPLE)]

    def category_of(composition: Composition) -> str | None:
        return composition.base

    def person_of(composition: Composition) -> str | None:
        return composition.subjects[0] if len(composition.subjects) == 1 else None

    def tone_of(composition: Composition) -> str | None:
        return f"{composition.tones[0]} skin tone" if len(composition.tones) == 1 else None

    who_and_tone = [f"{who} {{}} {tone}".strip() for who in ("", *_PEOPLE) for tone in ("", *_TONES)]
    act_and_tone = [f"{{}} {act} {tone}".strip() for act in acts for tone in ("", _TONES[0], _TONES[-1])]
    who_and_act = [f"{who} {act} {{}}" for who in _PEOPLE for act in acts]
    return [
        _question("category", categories, who_and_tone, category_of, pairs, compositions),
        _question("person", list(_PEOPLE), act_and_tone, person_of, pairs, compositions),
        _question("skin tone", list(_TONES), who_and_act, tone_of, pairs, compositions),
    ]


def _question(
    name: str,
    class_names: list[str],
    templates: list[str],
    answer: Callable[[Composition], str | None],
    pairs: EmojiPairs,
    compositions: Sequence[Composition],
) -> ZeroShotQuestion:
    label_of = {class_name: label for label, class_name in enumerate(class_names)}
    answered = [
        (index, label_of[right])
        for index in pairs.held_out_indices.tolist()
        if (right := answer(compositions[index])) in label_of
    ]
    indices, labels = np.array(answered, dtype=np.int64).reshape(-1, 2).T
    return ZeroShotQuestion(name, class_names, templates, indices, labels)
