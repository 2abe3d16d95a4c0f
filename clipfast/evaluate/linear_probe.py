"""A linear classifier on frozen features: what they know of classes without any text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipfast.evaluate.zero_shot import mean_per_class

# two a decade; the paper's sweep is wider, from 1e-6 to 1e6, and costs far more at its end
SWEEP = tuple(float(c) for c in np.logspace(-2, 4, 13))

_SMALL_PRODUCT = 1 << 27


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe came to.

    Attributes:
        metrics: ``top1``, ``top5`` (where there are more than five classes), ``mean_per_class_recall`` and
            ``chance1``, that of always naming the commonest class of the test labels.
        c: The inverse of the L2 penalty that was used.
        converged: Whether the solver came to its end.
    """

    metrics: dict[str, float]
    c: float
    converged: bool


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    c: float | Sequence[float] = 0.316,
    validation_share: float = 0.2,
    max_iterations: int = 1000,
    seed: int = 0,
    on_fit: Callable[[int], None] | None = None,
) -> LinearProbe:
    """Fit logistic regression on features and measure it on others, by scikit-learn's L-BFGS.

    Args:
        train_features: ``[N, E]``, used as they are: the paper takes the image tower's features without normalising.
        train_labels: int64 ``[N]``.
        test_features: ``[M, E]``.
        test_labels: int64 ``[M]``; a class that training lacks is never right.
        c: scikit-learn's ``C``. Of several, such as :data:`SWEEP`, the one that does best on a held-out part of the
            training features is taken (of equals the smallest), and the fit made anew on all of them.
        validation_share: That part's share, of every class alike.
        max_iterations: Of the solver.
        seed: Of the held-out part.
        on_fit: Called with 1 after each fit: one for every C of several, and one.

    Raises:
        ImportError: scikit-learn is missing.
        ValueError: Shapes or labels that do not fit, features that are not finite, fewer than two classes to train
            on, or too few samples of a class to hold a part out.

    Source: Radford et al. (2021), section 3.2 and appendix A.3; C = 0.316 is that of OpenAI's example.
    """
    train_features, train_labels = _checked(train_features, train_labels, "train")
    test_features, test_labels = _checked(test_features, test_labels, "test")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(f"test_features: got width {test_features.shape[1]}, expected {train_features.shape[1]}")
    if len(np.unique(train_labels)) < 2:
        raise ValueError("train_labels: got one class, expected at least two")
    candidates = candidates_of(c)
    if len(candidates) > 1:
        chosen = _choose(candidates, train_features, train_labels, validation_share, max_iterations, seed, on_fit)
    else:
        chosen = candidates[0]
    fitted = _fit(chosen, train_features, train_labels, max_iterations)
    if on_fit is not None:
        on_fit(1)

    ranks = _ranks(fitted, test_features, test_labels)
    metrics = {"top1": float((ranks <= 1).mean())}
    if len(fitted.classes_) > 5:
        metrics["top5"] = float((ranks <= 5).mean())
    labels = torch.from_numpy(test_labels)
    metrics["mean_per_class_recall"] = mean_per_class(torch.from_numpy(ranks <= 1), labels)
    metrics["chance1"] = torch.bincount(labels).max().item() / len(labels)
    return LinearProbe(metrics, chosen, bool(fitted.n_iter_.max() < max_iterations))


def candidates_of(c: float | Sequence[float]) -> list[float]:
    """Return the values of C to choose from, ascending.

    Raises:
        ValueError: There are none, or one is no positive number.
    """
    candidates = [float(c)] if isinstance(c, (int, float)) else sorted(map(float, c))
    if not candidates or not all(0 < value < math.inf for value in candidates):
        raise ValueError(f"c: got {c!r}, expected positive numbers")
    return candidates


def split_for_probe(labels: Tensor, share: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split samples into a part to train on and one to test on, every class alike.

    Args:
        labels: int64 ``[N]``.
        share: Of the test part, in (0, 1).
        seed: Of the draw.

    Returns:
        int64 indices, ascending.

    Raises:
        ValueError: A class has fewer than two samples.
    """
    train, test = _split(labels.numpy(), share, seed)
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(test))


def _checked(features: Tensor, labels: Tensor, part: str) -> tuple[np.ndarray, np.ndarray]:
    if features.dim() != 2 or not len(features) or labels.shape != (len(features),) or labels.is_floating_point():
        raise ValueError(
            f"{part}_features, {part}_labels: got {tuple(features.shape)} and {labels.dtype} {tuple(labels.shape)}, "
            f"expected [N, E] and integers [N], with at least one row"
        )
    if not features.isfinite().all():
        raise ValueError(f"{part}_features: got NaN or infinity, expected finite features")
    if labels.min() < 0:
        raise ValueError(f"{part}_labels: got {labels.min().item()}, expected indices from 0 up")
    return features.detach().double().cpu().numpy(), labels.cpu().numpy()


def _fit(c: float, features: np.ndarray, labels: np.ndarray, max_iterations: int) -> Any:
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    # on a busy machine, threads that wait for each other made small products 60 times slower
    threads = 1 if features.size * (labels.max() + 1) < _SMALL_PRODUCT else None
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore", ConvergenceWarning)  # the result says it
        return LogisticRegression(C=c, max_iter=max_iterations).fit(features, labels)


def _choose(
    candidates: list[float],
    features: np.ndarray,
    labels: np.ndarray,
    share: float,
    max_iterations: int,
    seed: int,
    on_fit: Callable[[int], None] | None,
) -> float:
    train, validation = _split(labels, share, seed)
    scores = []
    for c in candidates:
        fitted = _fit(c, features[train], labels[train], max_iterations)
        scores.append(fitted.score(features[validation], labels[validation]))
        if on_fit is not None:
            on_fit(1)
    return candidates[int(np.argmax(scores))]


def _split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.model_selection import train_test_split

    try:
        return train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=seed)
    except ValueError as error:
        raise ValueError(f"labels: got {len(labels)} that cannot be split with a share of {share}: {error}") from error


def _ranks(fitted: Any, features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The place of each right class among all by its score, as predictions have it: of equals the first class first.

    A class that training lacked is beyond all.
    """
    scores = fitted.decision_function(features)
    if scores.ndim == 1:  # of two classes, the second's
        scores = np.stack([-scores, scores], axis=1)
    classes = fitted.classes_
    place = np.minimum(np.searchsorted(classes, labels), len(classes) - 1)
    right = scores[np.arange(len(scores)), place][:, None]
    before = (scores > right) | ((scores == right) & (np.arange(len(classes)) < place[:, None]))
    ranks = 1 + before.sum(axis=1)
    return np.where(classes[place] == labels, ranks, len(classes) + 1)
