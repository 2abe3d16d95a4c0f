"""Zero-shot classification: classes are sentences, and the nearest one wins."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def zero_shot_classifier(
    encode_text: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    class_names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]],
    *,
    batch_size: int = 256,
    device: torch.device | str | None = None,
) -> Tensor:
    """Make the weights of a linear classifier from the names of its classes.

    Each class is the normalised mean of the normalised features of all its prompts, as in the notebook that OpenAI
    published with CLIP (Radford et al., 2021, section 3.1.4).

    Args:
        encode_text: Token ids ``[B, L]`` to features ``[B, E]``: ``model.encode_text`` of a model in ``eval()``.
        tokenizer: A list of strings to token ids, such as :class:`clipfast.Tokenizer`.
        class_names: C names.
        templates: T prompts: strings with one ``{}`` for the name, or functions of the name.
        batch_size: The most prompts encoded at once.
        device: Where ``encode_text`` wants its tokens; the CPU by default.

    Returns:
        ``[E, C]``, columns of unit length; normalised image features times this are cosines.

    Raises:
        ValueError: No classes, no templates, or a template without ``{}``.
    """
    if not class_names or not templates:
        raise ValueError(
            f"class_names, templates: got {len(class_names)} and {len(templates)}, expected at least one of each"
        )
    prompts = [_fill(template, name) for name in class_names for template in templates]
    features = []
    for start in range(0, len(prompts), batch_size):
        tokens = tokenizer(prompts[start : start + batch_size])
        features.append(F.normalize(encode_text(tokens.to(device or "cpu")).float(), dim=-1))
    classes = torch.cat(features).unflatten(0, (len(class_names), len(templates))).mean(dim=1)
    return F.normalize(classes, dim=-1).T


def zero_shot_accuracy(
    image_features: Tensor, classifier: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5)
) -> dict[str, float]:
    """Measure how often an image's class is among the k best.

    Classes that score the same as the right one count against the model.

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
    scores = F.normalize(images, dim=-1) @ classifier.float()
    right = scores.gather(1, labels[:, None])
    # the right class itself is one of those that reach its own score
    ranks = (scores >= right - 8 * torch.finfo(scores.dtype).eps).sum(dim=1)
    commonest = torch.bincount(labels, minlength=classes).sort(descending=True).values
    result = {f"top{k}": (ranks <= k).double().mean().item() for k in ks}
    result["mean_per_class_recall"] = mean_per_class(ranks == 1, labels)
    return result | {f"chance{k}": commonest[:k].sum().item() / len(labels) for k in ks}


def mean_per_class(right: Tensor, labels: Tensor) -> float:
    """Return the mean over classes of the share of their samples that are right.

    Args:
        right: bool ``[N]``.
        labels: int64 ``[N]``; classes that it lacks do not count.
    """
    samples = torch.bincount(labels)
    shares = torch.bincount(labels, weights=right.double()) / samples
    return shares[samples > 0].mean().item()


def _fill(template: str | Callable[[str], str], name: str) -> str:
    if callable(template):
        return template(name)
    if "{}" not in template:
        raise ValueError(f"templates: got {template!r}, expected a {{}} where the class name goes")
    return template.replace("{}", name)
