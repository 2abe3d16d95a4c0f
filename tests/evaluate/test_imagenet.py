from __future__ import annotations

import random
import sys
from pathlib import Path

import open_clip
import pytest
import timm

from clipfast.evaluate.imagenet import imagenet_names, imagenet_names_of, imagenet_synsets, imagenet_templates


def test_names_and_templates_are_openais():
    assert imagenet_names() == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert list(imagenet_templates()) == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert (imagenet_names()[657], imagenet_names()[744], imagenet_names()[836]) == ("missile", "missile", "sunglasses")


def test_synsets_are_timms_and_sorted():
    of_timm = Path(timm.__file__).parent / "data" / "_info" / "imagenet_synsets.txt"
    assert list(imagenet_synsets()) == of_timm.read_text().split() == sorted(imagenet_synsets())


def test_folders_are_named_by_synset_or_number():
    assert imagenet_names_of(imagenet_synsets()) == list(imagenet_names())
    # a part, as in ImageNet-A: names follow the synset and not the place
    assert imagenet_names_of(["n07579787", "n01440764"]) == ["plate", "tench"]
    # as folders of numbers come sorted: 10 before 2
    numbers = sorted(map(str, range(1000)))
    assert imagenet_names_of(numbers) == [imagenet_names()[int(n)] for n in numbers]
    padded = [f"{n:04d}" for n in range(1000)]
    random.Random(0).shuffle(padded)
    assert imagenet_names_of(padded) == [imagenet_names()[int(n)] for n in padded]
    assert imagenet_names_of(numbers[:5], told=True) == [imagenet_names()[int(n)] for n in numbers[:5]]


def test_folders_that_are_called_otherwise():
    for folders in (["cat", "dog"], list(map(str, range(999))), list(map(str, range(1001))), ["0"] * 1000, []):
        assert imagenet_names_of(folders) is None
    with pytest.raises(ValueError, match=r"class_names: got 'n99999999' and 1 more of 3 classes, expected ImageNet's"):
        imagenet_names_of(["n01440764", "n99999999", "cat"])
    with pytest.raises(ValueError, match="class_names: got 'cat' of 2 classes"):
        imagenet_names_of(["cat", "7"], told=True)


def test_it_costs_nothing_before_it_is_used():
    assert sys.getsizeof(imagenet_templates()) < 1000  # and it is one object
    assert imagenet_templates() is imagenet_templates()
