"""ImageNet as zero-shot classification knows it: OpenAI's 1,000 names and 80 templates, and WordNet's synsets.

The data is ``imagenet.json``. Names and templates are those of ``notebooks/Prompt_Engineering_for_ImageNet.ipynb`` of
OpenAI's CLIP (MIT; ``clipfast/data/VOCABULARY_LICENSE``), which open_clip and clip-benchmark use, too. Two names stand
for two classes each, "missile" and "sunglasses"; published figures are measured with them (open_clip#917).
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

_SYNSET = re.compile(r"n\d{8}")


@functools.cache
def _data() -> tuple[dict[str, str], tuple[str, ...]]:
    """Return names by synset, in the order of the classes' numbers, and templates."""
    held = json.loads(Path(__file__).with_name("imagenet.json").read_text(encoding="utf-8"))
    return dict(held["classes"]), tuple(held["templates"])


def imagenet_names() -> tuple[str, ...]:
    """Return the 1,000 names in the order of the classes' numbers."""
    return tuple(_data()[0].values())


def imagenet_synsets() -> tuple[str, ...]:
    """Return the 1,000 synsets, such as ``n01440764``, in the order of the classes' numbers: sorted, they are."""
    return tuple(_data()[0])


def imagenet_templates() -> tuple[str, ...]:
    """Return OpenAI's 80 templates, with ``{}`` where the name goes."""
    return _data()[1]


def imagenet_names_of(folders: Sequence[str], *, told: bool = False) -> list[str] | None:
    """Name classes that are called as ImageNet's folders are.

    Args:
        folders: Names of folders: synsets, all 1,000 or some of them (ImageNet-A, ImageNet-R), or the 1,000 numbers
            0 to 999 in any order and with any number of zeros before them (ImageNetV2).
        told: Whether they are known to be ImageNet's. Some of the numbers are enough then.

    Returns:
        A name for each, or None where they are called otherwise and nobody told.

    Raises:
        ValueError: Some are synsets, and others are no class of ImageNet's 1,000; or they should be ImageNet's and
            are not.
    """
    names = _data()[0]
    if told or any(_SYNSET.fullmatch(folder) for folder in folders):
        by_number = dict(enumerate(names.values()))
        found = [names.get(folder) or by_number.get(_number(folder)) for folder in folders]
        strange = [folder for folder, name in zip(folders, found, strict=True) if name is None]
        if strange:
            raise ValueError(
                f"class_names: got {strange[0]!r}{_more(len(strange) - 1)} of {len(folders)} classes, expected "
                f"ImageNet's 1,000 synsets or their numbers, or a file that names every class"
            )
        return found
    in_order = list(names.values())
    numbers = [_number(folder) for folder in folders]
    return [in_order[number] for number in numbers] if sorted(numbers) == list(range(len(names))) else None


def _number(folder: str) -> int:
    return int(folder) if folder.isascii() and folder.isdecimal() else -1


def _more(count: int) -> str:
    return f" and {count} more" if count else ""
