"""The same figures as open_clip's and clip-benchmark's own functions on the same features."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from open_clip_train import zero_shot as open_clip_zero_shot
from sklearn.metrics import balanced_accuracy_score

from clipfast.evaluate.retrieval import retrieval_recall
from clipfast.evaluate.templates import TEMPLATES
from clipfast.evaluate.zero_shot import zero_shot_accuracy, zero_shot_classifier


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Tower(torch.nn.Module):
    """Texts and images to features, by tables: ids ``[B, 1]``."""

    def __init__(self) -> None:
        super().__init__()
        self.images, self.texts = draw(60, 12, seed=0), draw(300, 12, seed=1)
        self.texts[::5] = self.images + 1.5 * draw(60, 12, seed=2)

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.images[images[:, 0].long()]

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        features = self.texts[tokens[:, 0].long()]
        return F.normalize(features, dim=-1) if normalize else features


def tokenizer(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[int("".join(c for c in text if c.isdecimal()))] for text in texts])


def test_retrieval_with_five_captions_an_image():
    model = Tower()
    rows = torch.arange(60)
    batches = [
        (rows[start : start + 7, None], [[str(5 * i + j) for j in range(5)] for i in rows[start : start + 7].tolist()])
        for start in range(0, 60, 7)
    ]
    theirs = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    ours = retrieval_recall(model.images, model.texts, image_of_text=rows.repeat_interleave(5))
    for k in (1, 5, 10):
        # their "image retrieval" is asked with texts
        assert ours[f"text_to_image_r{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert ours[f"image_to_text_r{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)
    assert 0 < ours["text_to_image_r1"] < ours["text_to_image_r10"] < 1


@pytest.fixture
def arrays_are_floats(monkeypatch):
    """Let both rivals turn an array of one number into a float, which NumPy 2.5 does no more."""
    for module in (open_clip_zero_shot, zeroshot_classification):
        monkeypatch.setattr(module, "float", lambda array: array.item(), raising=False)


def test_classification(arrays_are_floats):
    model = Tower()
    labels = (torch.rand(60, generator=torch.Generator().manual_seed(3)) ** 2 * 9).long()
    names = [str(5 * int((labels == c).nonzero()[0, 0])) for c in range(9)]
    templates = ["number {}", "the {}"]
    classifier = zero_shot_classifier(model.encode_text, tokenizer, names, templates)
    theirs = open_clip.build_zero_shot_classifier(
        model, tokenizer, names, [lambda c: f"number {c}", lambda c: f"the {c}"], num_classes_per_batch=4
    )
    torch.testing.assert_close(classifier, theirs.float(), rtol=0, atol=1e-6)
    benchmark = zeroshot_classification.zero_shot_classifier(
        model, tokenizer, names, [t.replace("{}", "{c}") for t in templates], "cpu", amp=False
    )
    torch.testing.assert_close(classifier, benchmark.float(), rtol=0, atol=1e-6)

    # each class' own prompts, of any number
    prompts = {name: [f"{5 * i + j}" for j in range(1 + i % 3)] for i, name in enumerate(names)}
    benchmark = zeroshot_classification.zero_shot_classifier(model, tokenizer, names, prompts, "cpu", amp=False)
    torch.testing.assert_close(
        zero_shot_classifier(model.encode_text, tokenizer, names, prompts), benchmark.float(), rtol=0, atol=1e-6
    )

    ours = zero_shot_accuracy(model.images, classifier, labels)
    logits = 100 * F.normalize(model.images, dim=-1) @ theirs
    counted = open_clip_zero_shot.accuracy(logits, labels, topk=(1, 5))
    assert [ours["top1"], ours["top5"]] == pytest.approx([right / 60 for right in counted], abs=1e-6)
    assert [ours["top1"], ours["top5"]] == pytest.approx(
        zeroshot_classification.accuracy(logits, labels, topk=(1, 5)), abs=1e-6
    )
    balanced = balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert ours["mean_per_class_recall"] == pytest.approx(balanced, abs=1e-12)
    assert ours["mean_per_class_recall"] != pytest.approx(ours["top1"], abs=1e-3)


def test_templates_are_openais():
    assert TEMPLATES["simple"] == tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)
