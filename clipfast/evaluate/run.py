"""What ``clipfast eval`` does: a model measured on data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from clipfast.data.labelled import LabelledSource, has_labels
from clipfast.data.model_inputs import model_and_tokenizer, picture_loader
from clipfast.data.options import DataOptions
from clipfast.data.pairs import PairError, PairSource
from clipfast.data.sources import open_pairs
from clipfast.data.tokenizer_base import AnyTokenizer
from clipfast.evaluate.class_cache import cached_classifier
from clipfast.evaluate.classes import (
    Classes,
    EvaluationWarning,
    effect_of_likeness,
    name_classes,
    open_classes,
)
from clipfast.evaluate.features import Encoded, encode_rows, picture_encoder, text_encoder
from clipfast.evaluate.linear_probe import SWEEP, candidates_of, linear_probe, split_for_probe
from clipfast.evaluate.probabilities import mean_probabilities, sigmoid_of
from clipfast.evaluate.results import Evaluation
from clipfast.evaluate.retrieval import retrieval_recall
from clipfast.evaluate.zero_shot import zero_shot_accuracy
from clipfast.files import path_text
from clipfast.models.clip import CLIP
from clipfast.progress import RowProgress
from clipfast.settings import at_least, between, check_setting

Task = Literal["auto", "zero-shot", "retrieval", "linear-probe"]
_AnyTokenizer = AnyTokenizer | str | os.PathLike[str] | None
TASKS = ("auto", "zero-shot", "retrieval", "linear-probe")
# which tasks use an argument
_USED_BY = {
    "class_names": ("zero-shot", "linear-probe"),
    "templates": ("zero-shot",),
    "prompts": ("zero-shot",),
    "train_data": ("linear-probe",),
    "c": ("linear-probe",),
}


@dataclass(frozen=True)
class Reading:
    """How data is read and encoded.

    Attributes:
        batch_size: Pictures or texts at once.
        workers: Threads that read and decode.
        console: Where progress goes, or None.
        options: How pictures are read, and what of the data is the picture and what the caption.
    """

    batch_size: int = 64
    workers: int = 2
    console: Console | None = None
    options: DataOptions = field(default_factory=DataOptions)

    def __post_init__(self) -> None:
        check_setting("batch_size", self.batch_size, int, at_least(1))
        check_setting("workers", self.workers, int, between(0, 1000))


def evaluate(
    model: CLIP | str | os.PathLike[str],
    data: str | os.PathLike[str],
    task: Task = "auto",
    *,
    class_names: str | os.PathLike[str] | None = None,
    templates: str | os.PathLike[str] | None = None,
    prompts: str | os.PathLike[str] | None = None,
    train_data: str | os.PathLike[str] | None = None,
    c: float | Sequence[float] = SWEEP,
    reading: Reading | None = None,
    options: DataOptions | None = None,
    tokenizer: _AnyTokenizer = None,
) -> Evaluation:
    """Measure a model.

    Args:
        model: In ``eval()``; or what :func:`~clipfast.models.open_model.open_model` opens: a run's folder, for one.
        data: Pictures with classes (:func:`clipfast.data.labelled.open_labelled`) or with captions
            (:func:`clipfast.data.sources.open_pairs`); ``digits``, ``scikit-image``, or ``emoji``, of which those that
            ``clipfast demo`` holds out.
        task: ``"auto"`` is zero-shot for pictures with classes and retrieval for pictures with captions.
        class_names: A file of names for the classes, or ``"imagenet"``, which is known by its synsets, too.
        templates: A name of :data:`clipfast.evaluate.templates.TEMPLATES`, or a file; ``"imagenet"`` for ImageNet's
            names and ``"simple"`` for others by default.
        prompts: A JSON file of each class' prompts, or of templates, in the place of ``templates``.
        train_data: What a linear probe is trained on; half of ``data``, of every class alike, where it is missing.
        c: Of the linear probe.
        reading: How to read.
        options: What is the picture and what the caption in data with captions.
        tokenizer: Of the model, for texts: one, or what :meth:`clipfast.Tokenizer.from_file` reads; CLIP's by default.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: An argument that does not fit, or that the task does not
            use; or nothing that could be read.

    Warns:
        EvaluationWarning: Classes have the same prompts; the effect is named.
    """
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, expected one of {', '.join(TASKS)}")
    candidates = candidates_of(c)  # what is wrong with it is told before a million pictures are read
    data = path_text(data, "data")
    other_data = None if train_data is None else path_text(train_data, "train_data")
    model, tokenizer = model_and_tokenizer(model, tokenizer)
    reading = reading or Reading()
    if options is not None:
        reading = replace(reading, options=options)
    if task == "auto":
        task = "zero-shot" if has_labels(data, options) else "retrieval"
    given = {
        "class_names": class_names is not None,
        "templates": templates is not None,
        "prompts": prompts is not None,
        "train_data": train_data is not None,
        "c": c is not SWEEP,
    }
    _check_used([name for name, is_given in given.items() if is_given], task)
    if task == "retrieval":
        source = open_pairs(data, options, image_size=model.config.vision_cfg.image_size)
        return _retrieval(model, source, reading, tokenizer)
    source = open_classes(data, class_names, reading.options.encoding)
    if task == "zero-shot":
        classes = name_classes(source, class_names, templates, prompts, reading.options.encoding)
        return _zero_shot(model, source, classes, reading, tokenizer)
    other = None if other_data is None else open_classes(other_data, class_names, reading.options.encoding)
    return _linear_probe(model, source, other, candidates, reading)


def _check_used(given: list[str], task: str) -> None:
    """Refuse what a task does not use: it would be taken for a part of what was measured."""
    for name in given:
        if task not in _USED_BY[name]:
            used_by = " or ".join(_USED_BY[name])
            raise ValueError(f"{name}: got one for {task}, which does not use it; {used_by} does")


def _zero_shot(
    model: CLIP, source: LabelledSource, classes: Classes, reading: Reading, tokenizer: _AnyTokenizer
) -> Evaluation:
    # the texts first: a model that cannot read them should not read a million pictures before
    with RowProgress("prompts", classes.prompt_count, reading.console, at_once=False) as progress:
        classifier = cached_classifier(model, classes.keys, classes.templates, tokenizer=tokenizer, on_prompts=progress)
    images = _pictures(model, source, reading)
    labels = torch.tensor(source.labels)[images.rows]
    count = len(classes.names)
    metrics = zero_shot_accuracy(images.features, classifier, labels, ks=(1, 5) if count > 5 else (1,))
    if (sigmoid := sigmoid_of(model)) is not None:
        metrics |= mean_probabilities(images.features, classifier.T, labels, torch.arange(count), sigmoid)
    alike, words = effect_of_likeness(classes, images.features, classifier, labels, metrics["top1"])
    if words:
        warnings.warn(words, EvaluationWarning, stacklevel=3)
    return Evaluation(
        "zero-shot",
        metrics,
        {"pictures": len(labels), "classes": count},
        classes.settings | alike,
        _by_name(images, source),
    )


def _linear_probe(
    model: CLIP, source: LabelledSource, train: LabelledSource | None, candidates: list[float], reading: Reading
) -> Evaluation:
    import sklearn  # noqa: F401  # what is missing, or does not fit, is told before any picture is read

    if train is not None and list(train.class_names) != list(source.class_names):
        raise ValueError(
            f"train_data: got the classes {', '.join(train.class_names[:5])}…, expected those of data: "
            f"{', '.join(source.class_names[:5])}…"
        )
    images = _pictures(model, source, reading)
    labels = torch.tensor(source.labels)[images.rows]
    skipped = _by_name(images, source)
    if train is None:
        rows, others = split_for_probe(labels)
        train_features, train_labels = images.features[rows], labels[rows]
        test_features, test_labels = images.features[others], labels[others]
    else:
        seen = _pictures(model, train, reading)
        train_features, train_labels = seen.features, torch.tensor(train.labels)[seen.rows]
        test_features, test_labels = images.features, labels
        skipped |= _by_name(seen, train)
    fits = 1 if len(candidates) == 1 else len(candidates) + 1
    with RowProgress("fits", fits, reading.console) as progress:
        probe = linear_probe(train_features, train_labels, test_features, test_labels, c=candidates, on_fit=progress)
    counts = {"pictures": len(test_labels), "trained_on": len(train_labels), "classes": len(source.class_names)}
    return Evaluation("linear-probe", probe.metrics, counts, {"C": probe.c, "converged": probe.converged}, skipped)


def _pictures(model: CLIP, source: LabelledSource, reading: Reading) -> Encoded:
    load = picture_loader(model, reading.options)
    with RowProgress("pictures", len(source), reading.console) as progress:
        images = encode_rows(
            picture_encoder(model),
            lambda row: load(source.read(row)),
            range(len(source)),
            batch_size=reading.batch_size,
            workers=reading.workers,
            on_rows=progress,
        )
    _require_some(images, source.name(0))
    return images


def _retrieval(model: CLIP, source: PairSource, reading: Reading, tokenizer: _AnyTokenizer) -> Evaluation:
    encoder = text_encoder(model, tokenizer)
    load = picture_loader(model, reading.options)
    captions: dict[int, tuple[str, list[str]]] = {}  # by row: which picture, and its captions
    unusable: dict[str, str] = {}
    owner: dict[str, int] = {}  # the row whose picture is encoded for all that share it

    def load_pair(row: int) -> Tensor | None:
        key, found = source.key(row), source.captions(row)
        texts = [text for text in found.texts if text.strip()]
        if not texts:
            raise PairError(f"{key}: got an empty caption")
        # a table that lists a picture with five captions means one picture
        pixels = load(source.image(row)) if owner.setdefault(key, row) == row else None
        captions[row] = (key, texts)
        unusable.update((f"{key}, {which}", reason) for which, reason in found.unusable)
        return pixels

    with RowProgress("pictures", len(source), reading.console) as progress:
        images = encode_rows(
            picture_encoder(model),
            load_pair,
            range(len(source)),
            batch_size=reading.batch_size,
            workers=reading.workers,
            on_rows=progress,
        )
    skipped = _skipped_pairs(images, source) | unusable
    _require_some(images, next(iter(skipped), "pair 0"))
    # which of a picture's rows was read first is the threads' choice; its place among the others is not
    first: dict[str, int] = {}
    for row in sorted(captions):
        first.setdefault(captions[row][0], row)
    order = sorted(range(len(images.rows)), key=lambda index: first[captions[images.rows[index]][0]])
    place = {captions[images.rows[index]][0]: number for number, index in enumerate(order)}
    pairs = [
        (place[key], text)
        for key, of_row in (captions[row] for row in sorted(captions))
        if key in place
        for text in of_row
    ]
    # a caption that comes twice is encoded once: equal texts score the same, whatever their batches
    texts = list(dict.fromkeys(text for _, text in pairs))
    number = {text: index for index, text in enumerate(texts)}
    with RowProgress("texts", len(texts), reading.console) as progress:
        encoded = encode_rows(
            encoder,
            texts.__getitem__,
            range(len(texts)),
            batch_size=reading.batch_size,
            workers=0,
            on_rows=progress,
        )
    features = encoded.features[[number[text] for _, text in pairs]]
    image_of_text = torch.tensor([picture for picture, _ in pairs])
    metrics = retrieval_recall(images.features[order], features, image_of_text=image_of_text)
    if (sigmoid := sigmoid_of(model)) is not None:
        own = torch.arange(len(images.rows))
        metrics |= mean_probabilities(images.features[order], features, own, image_of_text, sigmoid)
    counts = {"pictures": len(images.rows), "texts": len(pairs)}
    return Evaluation("retrieval", metrics, counts, {}, skipped)


def _skipped_pairs(images: Encoded, source: PairSource) -> dict[str, str]:
    """Name what was left out; rows that name one picture stay two."""
    skipped: dict[str, str] = {}
    for row, reason in images.skipped.items():
        try:
            name = source.key(row)
        except PairError:
            name = f"pair {row}"
        skipped[f"{name}, pair {row}" if name in skipped else name] = reason
    return skipped


def _by_name(images: Encoded, source: LabelledSource) -> dict[str, str]:
    return {source.name(row): reason for row, reason in images.skipped.items()}


def _require_some(images: Encoded, first: str) -> None:
    if not images.rows:
        reason = next(iter(images.skipped.values()), "there are none")
        raise ValueError(
            f"data: got no picture that could be read, expected at least one; the first, {first}: {reason}"
        )
