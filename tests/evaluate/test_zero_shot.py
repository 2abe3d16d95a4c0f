from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.evaluate.zero_shot import classes_alike, zero_shot_accuracy, zero_shot_classifier

TEMPLATES = ("a photo of a {}.", "the {}", lambda name: f"{name}s")


def tokenizer(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[len(text), sum(map(ord, text)) % 97] for text in texts])


def encode_text(tokens: torch.Tensor) -> torch.Tensor:
    """Features of several lengths, so that a forgotten normalisation shows."""
    table = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return table[tokens[:, 0]] * 10 + table[tokens[:, 1]] * tokens[:, 1:]


def lower_tokenizer(texts: list[str]) -> torch.Tensor:
    """Small letters and blanks that do not matter, as in CLIP's."""
    return tokenizer([" ".join(text.lower().replace(".", " ").split()) for text in texts])


def noisy_encode_text(tokens: torch.Tensor) -> torch.Tensor:
    """Features whose last bits depend on the batch, as those of a matrix product may."""
    return encode_text(tokens) * (1 + 1e-6 * torch.rand(len(tokens), 5, dtype=torch.float64))


def test_classifier_is_the_mean_of_normalised_prompts():
    names = ["cat", "zebra", "ox"]
    weights = zero_shot_classifier(encode_text, tokenizer, names, TEMPLATES, batch_size=2)
    assert weights.shape == (5, 3)
    for column, name in zip(weights.T, names, strict=True):
        prompts = [f"a photo of a {name}.", f"the {name}", f"{name}s"]
        units = [v / v.norm() for v in encode_text(tokenizer(prompts))]
        mean = sum(units) / 3
        torch.testing.assert_close(column, (mean / mean.norm()).float())


def test_classifier_agrees_with_open_clip():
    open_clip = pytest.importorskip("open_clip")

    class Model(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
            features = encode_text(tokens).float()
            return F.normalize(features, dim=-1) if normalize else features

    names = [f"thing {'x' * i}" for i in range(7)]
    templates = [lambda c: f"a {c}", lambda c: f"the large {c}"]
    theirs = open_clip.build_zero_shot_classifier(Model(), tokenizer, names, templates, num_classes_per_batch=3)
    ours = zero_shot_classifier(encode_text, tokenizer, names, templates)
    torch.testing.assert_close(ours, theirs)


def test_accuracy_by_hand():
    classifier = torch.eye(3)
    images = torch.tensor([[9.0, 1, 0], [1, 5, 2], [0, 3, 2], [2, 1, 0]])
    result = zero_shot_accuracy(images, classifier, torch.tensor([0, 1, 2, 2]), ks=(1, 2, 3))
    expected = {"top1": 0.5, "top2": 0.75, "top3": 1.0, "chance1": 0.5, "chance2": 0.75, "chance3": 1.0}
    # classes 0 and 1 are always right, class 2 never
    assert result == expected | {"mean_per_class_recall": pytest.approx(2 / 3)}


def test_of_equal_classes_the_first_is_best():
    same = F.normalize(torch.ones(5, 9), dim=0)
    result = zero_shot_accuracy(torch.ones(20, 5), same, torch.arange(20) % 9)
    # class 0 is named for every picture: three of twenty, and of its own class all
    assert result["top1"] == 3 / 20
    assert result["top5"] == pytest.approx(3 * 2 / 20 + 3 * 2 / 20)
    assert result["mean_per_class_recall"] == pytest.approx(1 / 9)


def test_two_classes_of_one_name_compete_by_their_index():
    """As argmax has it: the first is named for pictures of both, whatever batches the prompts were encoded in."""
    names = ["cat", "missile", "ox", "Missile ", "dog"]
    for batch_size in (1, 2, 3, 256):
        classifier = zero_shot_classifier(
            noisy_encode_text, lower_tokenizer, names, ["a {}.", "the {}"], batch_size=batch_size
        )
        assert torch.equal(classifier[:, 1], classifier[:, 3])
        assert classes_alike(classifier) == [[1, 3]]
        images = classifier.T.repeat(4, 1)
        labels = torch.arange(5).repeat(4)
        result = zero_shot_accuracy(images, classifier, labels, ks=(1, 2))
        assert result["top1"] == ((images @ classifier).argmax(dim=1) == labels).double().mean() == 0.8
        assert result["top2"] == 1
        assert result["mean_per_class_recall"] == pytest.approx(0.8)


def test_prompts_of_each_class():
    """As clip-benchmark takes CuPL's: by name, unfilled, and as many of a class as there are."""
    prompts = {"cat": ["a cat {}", "it purrs"], "ox": ["an ox"], "unused": ["x"]}
    weights = zero_shot_classifier(encode_text, tokenizer, ["ox", "cat"], prompts, batch_size=2)
    for column, name in zip(weights.T, ("ox", "cat"), strict=True):
        mean = sum(v / v.norm() for v in encode_text(tokenizer(prompts[name])))
        torch.testing.assert_close(column, (mean / mean.norm()).float())
    told = []
    zero_shot_classifier(encode_text, tokenizer, ["ox", "cat", "ox"], prompts, on_prompts=told.append)
    assert sum(told) == 4
    with pytest.raises(ValueError, match="prompts: got none for the class 'dog' and 1 more of 3"):
        zero_shot_classifier(encode_text, tokenizer, ["dog", "cat", "owl"], prompts)


def test_errors():
    with pytest.raises(ValueError, match="got 0 and 3"):
        zero_shot_classifier(encode_text, tokenizer, [], TEMPLATES)
    with pytest.raises(ValueError, match=r"templates: got 'a photo', expected a \{\}"):
        zero_shot_classifier(encode_text, tokenizer, ["cat"], ["a photo"])
    with pytest.raises(ValueError, match=r"got \(2, 4\), \(5, 3\) and \(2,\)"):
        zero_shot_accuracy(torch.ones(2, 4), torch.ones(5, 3), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="labels: got"):
        zero_shot_accuracy(torch.ones(2, 5), torch.ones(5, 3), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="NaN"):
        zero_shot_accuracy(torch.full((2, 5), torch.nan), torch.ones(5, 3), torch.tensor([0, 1]))
