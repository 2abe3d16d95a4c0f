"""Probabilities of a model that learned by the sigmoid loss: in evaluations, searches and pictures."""

from __future__ import annotations

import json

import pytest
import small
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from clipfast.cli import app
from clipfast.evaluate import probabilities
from clipfast.evaluate.probabilities import Sigmoid, mean_probabilities, sigmoid_of
from clipfast.visualize.similarity_matrix import plot_similarity_matrix

SIGMOID = {"init_logit_scale": 2.5, "init_logit_bias": -3.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def run(*arguments: object):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_sigmoid_is_that_of_the_models_logits():
    model = small.model(**SIGMOID)
    images, tokens = torch.randn(3, 3, 32, 32), torch.tensor([[5, 49407], [7, 49407]])
    logits, _ = model.get_logits(images, tokens)
    cosines = model.encode_image(images, normalize=True) @ model.encode_text(tokens, normalize=True).T
    torch.testing.assert_close(sigmoid_of(model)(cosines), logits.sigmoid())
    assert sigmoid_of(small.model()) is None


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_means_are_over_all_pairs(chunk, monkeypatch):
    monkeypatch.setattr(probabilities, "SCORES_IN_MEMORY", chunk)
    images, texts = 3 * torch.randn(5, 8), torch.randn(7, 8)
    of_text = torch.tensor([0, 1, 1, 2, 3, 4, 4])
    found = mean_probabilities(images, texts, torch.arange(5), of_text, Sigmoid(10.0, -4.0))
    every = (10 * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T - 4).sigmoid()
    right = torch.arange(5)[:, None] == of_text
    expected = {"probability_right": every[right].mean().item(), "probability_wrong": every[~right].mean().item()}
    assert found == pytest.approx(expected, rel=1e-5)
    alone = mean_probabilities(images[:1], texts[:1], torch.tensor([0]), torch.tensor([0]), Sigmoid(1.0, 0.0))
    assert alone.keys() == {"probability_right"}


def test_measures_search_and_pictures_have_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, changes in (("softmax", {}), ("sigmoid", SIGMOID)):
        small.run(tmp_path / name, **changes)
    small.write_pictures(tmp_path / "pictures", 4)
    found = {
        name: json.loads(run("eval", name, "--data", "pictures", "--json"))["metrics"]
        for name in ("softmax", "sigmoid")
    }
    more = {name: found["sigmoid"].pop(name) for name in ("probability_right", "probability_wrong")}
    # the ranking is the same
    assert found["softmax"] == found["sigmoid"]
    assert all(0 < value < 1 for value in more.values())
    classes = json.loads(run("eval", "sigmoid", "--data", "digits", "--templates", "photo", "--json"))["metrics"]
    assert classes.keys() >= {"top1", "probability_right", "probability_wrong"}

    sigmoid = sigmoid_of(small.model(**SIGMOID))
    words, picture = ["a red thing"], ["--image", "pictures/01.png"]
    for kind, query, other in (("image", words, picture), ("text", picture, words)):
        run("embed", "sigmoid", "pictures", f"{kind}.parquet", "--kind", kind)
        hits = json.loads(run("search", f"{kind}.parquet", *query, "--json"))["hits"]
        expected = sigmoid(torch.tensor([hit["cosine"] for hit in hits]))
        assert [hit["probability"] for hit in hits] == pytest.approx(expected.tolist(), rel=1e-5)
        assert "probability" in run("search", f"{kind}.parquet", *query)
        # of two pictures, or two texts, it says nothing
        assert "probability" not in json.loads(run("search", f"{kind}.parquet", *other, "--json"))["hits"][0]
    run("embed", "softmax", "pictures", "plain.npy")
    assert "probability" not in run("search", "plain.npy", "a red thing")

    for name, words in (("softmax", "Cosine similarities"), ("sigmoid", "How probable it is that each text fits")):
        run("show", name, "pictures/00.png", "pictures/01.png", "--text", "a red thing", "--output", f"{name}-out")
        assert words in (tmp_path / f"{name}-out" / "report.html").read_text()


def test_cells_show_what_is_small():
    picture = torch.zeros(4, 4, 3, dtype=torch.uint8).numpy()
    cosines = torch.tensor([[0.1, 0.2, 0.3]])
    figure = plot_similarity_matrix(cosines, ["a"], [picture] * 3, torch.tensor([[2e-5, 0.0314, 0.9876]]))
    assert [text.get_text() for text in figure.axes[0].texts] == ["2e-05", "3.1%", "98.8%"]
