"""Zero-shot classification: classes are sentences, and the nearest one wins."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfast.evaluate.prompts import Template, class_prompts
from clipfast.evaluate.ranking import ranks_of_right

# prompts that are tokenised at a time, in batches of the model's
_BATCHES_IN_HAND = 16


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[Template] | Mapping[str, Sequence[str]],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
    on_prompts: Callable[[int], None] | None = None,
) -> Tensor:
    """Make the weights of a linear classifier from the names of its classes.

    Each class is the normalised mean of the normalised features of all its prompts, as in the notebook that OpenAI
    published with CLIP (Radford et al., 2021, section 3.1.4). Classes whose prompts are the same to the tokenizer are
    encoded once and get the same bits, whatever the batches: their scores are equal for every image.

    Args:
        encode_text: Token ids ``[B, L]`` to features ``[B, E]``: ``model.encode_text`` of a model in ``eval()``.
        tokenizer: A list of strings to token ids, such as :class:`clipfast.Tokenizer`.
        class_names: C names, which may come twice.
        templates: Prompts for all classes: strings with one ``{}`` for the name, or functions of the name. Or the
            prompts of each class by its name, as CuPL has them (Pratt et al., 2023).
        batch_size: The most prompts encoded at once.
        device: Where ``encode_text`` wants its tokens; the CPU by default.
        on_prompts: Called with the number of prompts each time some are done.

    Returns:
        float32 ``[E, C]`` on the CPU, columns of unit length; normalised image features times this are cosines.

    Raises:
        ValueError: No classes, no templates, a template without ``{}``, or a class without prompts.
    """
    prompts = class_prompts(class_names, templates)
    known: dict[bytes, int] = {}
    column_of_class: list[int] = []
    columns: list[Tensor] = []
    for part in _parts(prompts, batch_size * _BATCHES_IN_HAND):
        lengths = [len(of_class) for of_class in part]
        tokens = tokenizer([prompt for of_class in part for prompt in of_class])
        new = []
        for of_class in tokens.split(lengths):
            digest = hashlib.sha256(of_class.cpu().numpy().tobytes()).digest()
            if digest not in known:
                known[digest] = len(known)
                new.append(of_class)
            column_of_class.append(known[digest])
        if new:
            encoded = [encode_text(batch.to(device or "cpu")) for batch in torch.cat(new).split(batch_size)]
            units = torch.cat([F.normalize(features.float(), dim=-1).double().cpu() for features in encoded])
            columns += [of_class.sum(dim=0) for of_class in units.split([len(of_class) for of_class in new])]
        if on_prompts is not None:
            on_prompts(sum(lengths))
    return F.normalize(torch.stack(columns)[column_of_class], dim=-1).float().T


def zero_shot_accuracy(
    image_features: Tensor, classifier: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Measure how often an image's class is among the k best.

    Of classes that score the same the one of the lower index goes first, as ``argmax`` has it
    (:mod:`clipfast.evaluate.ranking`). Of two classes with the same prompts, the second is so never the best: half of
    their images are wrong, as in figures that the rivals publish.

    Args:
        image_features: ``[N, E]``; their length does not matter.
        classifier: ``[E, C]`` of :func:`zero_shot_classifier`.
        labels: int64 ``[N]``, indices of the right classes.
        ks: How many of the best classes count.

    Returns:
        For each k ``top{k}``, a share in [0, 1], and ``chance{k}``, that of always naming the k commonest classes
        of ``labels``, which no blind classifier can beat. ``mean_per_class_recall`` is the mean of the classes' own
        top-1 (scikit-learn's balanced accuracy; clip-benchmark's name), over the classes that ``labels`` has.

    Raises:
        ValueError: Shapes or labels that do not fit, no images, or features that are not finite.
    """
    images = image_features.detach().float()
    if images.dim() != 2 or images.shape[1] != classifier.shape[0] or labels.shape != (len(images),):
        raise ValueError(
            f"image_features, classifier, labels: got {tuple(images.shape)}, {tuple(classifier.shape)} and "
            f"{tuple(labels.shape)}, expected [N, E], [E, C] and [N]"
        )
    classes = classifier.shape[1]
    if not len(labels) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels: got {labels.tolist()[:8]}…, expected at least one index, 0 to {classes - 1}")
    if not images.isfinite().all():
        raise ValueError("image_features: got NaN or infinity, expected finite features")
    columns = classifier.to(images.device, torch.float32).T
    numbers = torch.arange(classes, device=images.device)
    ranks = ranks_of_right(F.normalize(images, dim=-1), columns, labels.to(images.device), numbers).to(labels.device)
    commonest = torch.bincount(labels, minlength=classes).sort(descending=True).values
    result = {f"top{k}": (ranks <= k).double().mean().item() for k in ks}
    result["mean_per_class_recall"] = mean_per_class(ranks == 1, labels)
    return result | {f"chance{k}": commonest[:k].sum().item() / len(labels) for k in ks}


def classes_alike(classifier: Tensor) -> list[list[int]]:
    """Return groups of classes that no image can tell apart, since their columns have the same bits.

    Args:
        classifier: ``[E, C]`` of :func:`zero_shot_classifier`.

    Returns:
        Indices, ascending, of each group of two or more; the group of the lowest index first.
    """
    groups: dict[bytes, list[int]] = {}
    for index, column in enumerate(classifier.T.contiguous().cpu().numpy()):
        groups.setdefault(column.tobytes(), []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def mean_per_class(right: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of the share of their samples that are right.

    Args:
        right: bool ``[N]``.
        labels: int64 ``[N]``; classes that it lacks do not count.
    """
    samples = torch.bincount(labels)
    shares = torch.bincount(labels, weights=right.double()) / samples
    return shares[samples > 0].mean().item()


def _parts(prompts: Sequence[Sequence[str]], size: int) -> Iterator[list[Sequence[str]]]:
    """Split classes into parts of ``size`` prompts or a few more."""
    part: list[Sequence[str]] = []
    count = 0
    for of_class in prompts:
        part.append(of_class)
        count += len(of_class)
        if count >= size:
            yield part
            part, count = [], 0
    if part:
        yield part
