"""Which classes a zero-shot evaluation tells apart, what they are called, and what two of one name come to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfast.data.labelled import LabelledSource, open_labelled
from clipfast.data.patterns import find_shards
from clipfast.evaluate.imagenet import imagenet_names, imagenet_names_of
from clipfast.evaluate.prompts import class_prompts, load_prompts
from clipfast.evaluate.templates import load_templates
from clipfast.evaluate.zero_shot import classes_alike, zero_shot_accuracy

IMAGENET = "imagenet"


class EvaluationWarning(UserWarning):
    """Figures that mean something else than they seem to."""


@dataclass(frozen=True)
class Classes:
    """What the classes of some pictures are called.

    Attributes:
        names: C names.
        keys: What ``templates`` knows each class by: its name, or where it gives prompts by folder its folder.
        templates: Templates for all, or prompts by key.
        settings: What a result says of this.
        folders: What the data call each class, where that is something else.
    """

    names: list[str]
    keys: list[str]
    templates: tuple[str, ...] | Mapping[str, Sequence[str]]
    settings: dict[str, Any] = field(default_factory=dict)
    folders: list[str] | None = None

    @property
    def prompt_count(self) -> int:
        """How many prompts there are in all."""
        return sum(map(len, class_prompts(self.keys, self.templates)))


def open_classes(data: str, class_names: str | os.PathLike[str] | None, encoding: str | None = None) -> LabelledSource:
    """Open pictures with classes; ``class_names`` may be ``"imagenet"`` beside what :func:`open_labelled` takes."""
    if not _is_imagenet(class_names):
        return open_labelled(data, class_names, encoding)
    return open_labelled(data, imagenet_names() if find_shards(data) else None)


def name_classes(
    source: LabelledSource,
    class_names: str | os.PathLike[str] | None,
    templates: str | os.PathLike[str] | None,
    prompts: str | os.PathLike[str] | None,
    encoding: str | None = None,
) -> Classes:
    """Decide what classes are called, and in what sentences.

    Args:
        source: Opened with :func:`open_classes` and the same ``class_names``.
        class_names: A file that named them, ``"imagenet"``, or None. With None, folders that are called as ImageNet's
            get its names.
        templates: For :func:`~clipfast.evaluate.templates.load_templates`. None is ``"imagenet"`` for ImageNet's
            names, and ``"simple"`` for others.
        prompts: For :func:`~clipfast.evaluate.prompts.load_prompts`, in the place of templates.
        encoding: Of the files; None is UTF-8.

    Raises:
        FileNotFoundError, ValueError: As those raise; both of templates and prompts; a class without prompts.
    """
    folders = list(source.class_names)
    told = _is_imagenet(class_names)
    own = class_names is not None and not told
    if folders == list(imagenet_names()):
        known: list[str] | None = folders
    else:
        known = None if own else imagenet_names_of(folders, told=told)
    names = known or folders
    settings: dict[str, Any] = {"class_names": IMAGENET} if known else {}
    renamed = folders if names != folders else None
    if prompts is None:
        chosen = load_templates(templates or (IMAGENET if known else "simple"), encoding)
        return Classes(names, names, chosen, settings | {"templates": list(chosen)}, renamed)
    if templates is not None:
        raise ValueError(f"templates, prompts: got {os.fspath(templates)!r} and {os.fspath(prompts)!r}, expected one")
    loaded = load_prompts(prompts, encoding)
    if not isinstance(loaded, Mapping):
        return Classes(names, names, loaded, settings | {"templates": list(loaded)}, renamed)
    keys = [folder if folder in loaded else name for folder, name in zip(folders, names, strict=True)]
    classes = Classes(names, keys, loaded, settings | {"prompts": os.fspath(prompts)}, renamed)
    classes.settings["prompt_count"] = classes.prompt_count
    return classes


def _is_imagenet(class_names: str | os.PathLike[str] | None) -> bool:
    return class_names is not None and os.fspath(class_names) == IMAGENET and not Path(IMAGENET).is_file()


def effect_of_likeness(
    classes: Classes, features: Tensor, classifier: Tensor, labels: Tensor, top1: float
) -> tuple[dict[str, Any], str]:
    """Return what classes with the same prompts do to a zero-shot result, as settings and in words; or ``({}, "")``.

    Args:
        classes: C classes.
        features: ``[N, E]`` of pictures.
        classifier: ``[E, C]``.
        labels: int64 ``[N]``.
        top1: What they come to.
    """
    groups = classes_alike(classifier)
    if not groups:
        return {}, ""
    first = torch.arange(len(classes.names))
    for group in groups:
        first[group] = group[0]
    as_one = zero_shot_accuracy(features, classifier, first[labels], ks=(1,))["top1"]
    published = ", as in published figures" if classes.settings.get("class_names") == IMAGENET else ""
    message = (
        f"class_names: got classes that have the same prompts: {_in_words(classes, groups)}. Their scores are equal "
        f"and the first is taken{published}, so the others are never right: top1 is {top1:.4f}, and {as_one:.4f} if "
        f"each group counts as one class"
    )
    return {"classes_alike": groups, "top1_if_alike_were_one": as_one}, message


def _in_words(classes: Classes, groups: list[list[int]], shown: int = 5) -> str:
    """Name the first groups and their first members: ``missile (657, 744); …``."""
    words = []
    for group in groups[:shown]:
        names = "/".join(dict.fromkeys(classes.names[index] for index in group[:shown]))
        called = [classes.folders[index] if classes.folders else str(index) for index in group[:shown]]
        more = f" and {len(group) - shown} more" if len(group) > shown else ""
        words.append(f"{names} ({', '.join(called)}{more})")
    more = f"; and {len(groups) - shown} more groups" if len(groups) > shown else ""
    return "; ".join(words) + more
