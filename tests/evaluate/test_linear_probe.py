from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from clipfast.evaluate import linear_probe as linear_probe_module
from clipfast.evaluate.linear_probe import linear_probe, split_for_probe


def data(classes: int, n: int, seed: int, noise: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 8, generator=torch.Generator().manual_seed(99))
    # classes of different sizes, so that the mean per class is another number than top-1
    labels = (torch.rand(n, generator=generator) ** 2 * classes).long()
    return centres[labels] + noise * torch.randn(n, 8, generator=generator), labels


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_it_is_scikit_learns(classes):
    train, test = data(classes, 300, 0), data(classes, 200, 1)
    probe = linear_probe(*train, *test, c=0.5)
    fitted = LogisticRegression(C=0.5, max_iter=1000).fit(train[0].double().numpy(), train[1].numpy())
    features, labels = test[0].double().numpy(), test[1].numpy()
    guesses = fitted.predict(features)
    assert 0.3 < probe.metrics["top1"] < 1
    assert probe.metrics["top1"] == pytest.approx((guesses == labels).mean(), abs=1e-12)
    assert probe.metrics["mean_per_class_recall"] == pytest.approx(balanced_accuracy_score(labels, guesses), abs=1e-12)
    assert probe.metrics["chance1"] == np.bincount(labels).max() / len(labels)
    assert probe.converged
    assert ("top5" in probe.metrics) == (classes > 5)
    if classes > 5:
        top5 = top_k_accuracy_score(labels, fitted.decision_function(features), k=5)
        assert probe.metrics["top5"] == pytest.approx(top5, abs=1e-12)


def test_c_is_chosen_on_what_is_held_out():
    train, test = data(4, 120, 0, noise=3), data(4, 200, 1, noise=3)
    sweep = (1e-6, 0.05, 1e4)
    probe = linear_probe(*train, *test, c=sweep)
    assert probe.c == 0.05  # the others name the commonest class, or learn the noise by heart
    assert probe.metrics == linear_probe(*train, *test, c=0.05).metrics
    # test labels do not choose: shuffled ones give the same C
    assert linear_probe(*train, test[0], test[1].roll(1), c=sweep).c == 0.05


def test_a_class_that_training_lacks_is_never_right():
    train, test = data(3, 200, 0), data(5, 200, 1)
    probe = linear_probe(*train, *test, c=1.0)
    known = test[1] < 3
    right = linear_probe(*train, test[0][known], test[1][known], c=1.0).metrics["top1"]
    assert probe.metrics["top1"] == pytest.approx(right * known.double().mean().item())


def test_a_solver_that_is_stopped_says_so():
    assert not linear_probe(*data(5, 300, 0), *data(5, 50, 1), c=1e4, max_iterations=2).converged


def test_a_split_is_of_every_class_alike():
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 4)
    train, test = split_for_probe(labels)
    assert sorted(train.tolist() + test.tolist()) == list(range(34))
    assert labels[test].bincount().tolist() == [5, 10, 2]
    assert torch.equal(split_for_probe(labels)[0], train)
    with pytest.raises(ValueError, match="labels: got 3 that cannot be split"):
        split_for_probe(torch.tensor([0, 0, 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.ones(3, 8)}, r"train_features, train_labels: got \(3, 8\)"),
        ({0: torch.full((4, 8), torch.nan)}, "train_features: got NaN"),
        ({2: torch.ones(4, 7)}, "test_features: got width 7, expected 8"),
        ({1: torch.zeros(4, dtype=torch.long)}, "train_labels: got one class"),
        ({3: torch.tensor([0, 1, -1, 0])}, "test_labels: got -1"),
        ({3: torch.ones(4)}, "test_features, test_labels: got .* torch.float32"),
    ],
)
def test_errors(change, message):
    arguments = [torch.randn(4, 8), torch.tensor([0, 1, 0, 1]), torch.randn(4, 8), torch.tensor([0, 1, 0, 1])]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        linear_probe(*arguments)
    with pytest.raises(ValueError, match="c: got"):
        linear_probe(*data(2, 20, 0), *data(2, 20, 1), c=(1.0, 0.0))


def test_of_equal_scores_the_first_class_goes_first():
    """As in predictions; a class that training lacked is beyond all."""
    fitted = SimpleNamespace(
        classes_=np.array([0, 2, 5]), decision_function=lambda features: np.array([[1.0, 1.0, 0.0]] * 4)
    )
    assert linear_probe_module._ranks(fitted, np.zeros((4, 1)), np.array([0, 2, 5, 3])).tolist() == [1, 2, 3, 4]
