"""Hold out captions whose parts are all known and whose combination is new.

A random split of "woman juggling dark skin tone", "tiger", "Togo" asks two different things at once: to
recombine what was learned, and to name what was never shown. Only the first can be learned, and only the first
is a test of a shared image-text space, so only compositions are held out here (compare Lake & Baroni, 2018,
and the held-out attribute-object pairs of MIT-States, Isola et al., 2015).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
SUBJECTS = ("woman", "man", "person", "women", "men", "people", "girl", "boy", "child")
COLOURS = ("blond", "red", "orange", "yellow", "green", "blue", "purple", "brown", "black", "white", "grey", "pink")
DIRECTIONS = ("facing right",)

_TONE = re.compile(rf"\b({'|'.join(sorted(SKIN_TONES, key=len, reverse=True))}) skin tone\b")
_MODIFIER = re.compile(rf"\b(?<!-)({'|'.join((*SUBJECTS, *COLOURS, *DIRECTIONS))})\b(?!['’-])")


@dataclass(frozen=True)
class Composition:
    """What a caption is made of: ``"woman juggling dark skin tone"`` is a woman, juggling, dark.

    ``base`` is the phrase that is left when subjects, skin tones, colours and directions are taken out; it is
    empty for "woman dark skin tone".
    """

    base: str
    subjects: tuple[str, ...]
    tones: tuple[str, ...]
    others: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts, sorted: captions that only differ in the order of their parts are one composition."""
        tones = (f"{tone} skin tone" for tone in self.tones)
        return tuple(sorted(part for part in (self.base, *self.subjects, *tones, *self.others) if part))


def parse_caption(caption: str) -> Composition:
    """Take a caption apart into base, subjects, skin tones, and colours and directions.

    Every word of ``caption`` is in exactly one part.
    """
    text = caption.lower()
    tones = tuple(_TONE.findall(text))
    text = _TONE.sub(" ", text)
    modifiers = _MODIFIER.findall(text)
    base = " ".join(_MODIFIER.sub(" ", text).split())
    subjects = tuple(word for word in modifiers if word in SUBJECTS)
    return Composition(base, subjects, tones, tuple(word for word in modifiers if word not in SUBJECTS))


def hold_out_compositions(captions: Sequence[str], fraction: float = 0.1, seed: int = 0) -> np.ndarray:
    """Choose captions to hold out, such that each is a new combination of known parts.

    A caption may be held out if it has two parts or more (see :class:`Composition`). Of the captions held out
    it holds that

    * every part, and so every word, also occurs in a caption that stays in training;
    * no caption in training has the same parts, in whatever order: "dark skin tone, light skin tone" leaves
      together with "light skin tone, dark skin tone".

    Args:
        captions: N captions.
        fraction: the share of all N captions to hold out, in [0, 1).
        seed: the choice is the same for the same captions and seed.

    Returns:
        bool ``[N]``, true where held out. ``round(fraction * N)`` are true, or a few fewer where the
        last composition would not fit.

    Raises:
        ValueError: ``fraction`` is outside [0, 1), or the captions hold too few compositions for it.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction: got {fraction}, expected a share in [0, 1)")
    wanted = round(fraction * len(captions))
    members: dict[tuple[str, ...], list[int]] = {}
    for index, caption in enumerate(captions):
        members.setdefault(parse_caption(caption).parts, []).append(index)
    # in how many compositions of the training side a part occurs
    training_uses = Counter(part for parts in members for part in set(parts))

    candidates = sorted(parts for parts in members if len(parts) >= 2)
    held_out = np.zeros(len(captions), dtype=bool)
    count = 0
    for position in np.random.default_rng(seed).permutation(len(candidates)):
        parts = candidates[position]
        if count + len(members[parts]) > wanted or any(training_uses[part] < 2 for part in parts):
            continue
        training_uses.subtract(set(parts))
        held_out[members[parts]] = True
        count += len(members[parts])
    if count < 0.9 * wanted:
        raise ValueError(
            f"fraction: {fraction} of {len(captions)} captions is {wanted}, but only {count} are combinations "
            "whose parts also occur elsewhere"
        )
    return held_out
