from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.offsetbox import AnnotationBbox

from clipfast.visualize.similarity_matrix import cosine_range, plot_similarity_matrix, similarity_matrix


def test_cosines():
    images, texts = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1)
    torch.testing.assert_close(similarity_matrix(images, texts), expected.float())


def test_what_is_drawn():
    cosines = torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.31, 0.0]])
    pictures = [np.full((20, 30 + 10 * i, 3), 50 * i, np.uint8) for i in range(3)]
    axes = plot_similarity_matrix(cosines, ["one", "two words"], pictures, logit_scale=5.0).axes[0]
    assert np.allclose(axes.images[0].get_array(), cosines.numpy())
    # each cosine above the share that a softmax gives the text among these
    assert [text.get_text().split("\n")[0] for text in axes.texts] == ["0.90", "-0.20", "0.10", "0.30", "0.31", "0.00"]
    shares = (5 * cosines).softmax(dim=0).flatten().tolist()
    assert [text.get_text().split("\n")[1] for text in axes.texts] == [f"{share:.0%}" for share in shares]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two words"]
    # the best text of each picture: a white frame and a blue one around its cell
    centres = [(line.get_xdata()[:4].mean(), line.get_ydata()[:4].mean()) for line in axes.lines]
    assert centres[::2] == centres[1::2]
    assert np.allclose(centres[::2], [(0, 0), (1, 1), (2, 0)])
    boxes = [artist for artist in axes.artists if isinstance(artist, AnnotationBbox)]
    assert [box.xy[0] for box in boxes] == [0, 1, 2]
    # columns are wide enough for their thumbnails
    assert len({round(max(b.offsetbox.get_data().shape) * b.offsetbox.get_zoom(), 3) for b in boxes}) == 1


def lightness(figure, row: int, column: int) -> float:
    """Return how light a cell is drawn: viridis runs from dark to light."""
    drawn = figure.axes[0].images[0]
    return float(np.dot(drawn.to_rgba(drawn.get_array())[row, column, :3], [0.299, 0.587, 0.114]))


def test_a_weak_match_looks_weak():
    """Colours do not depend on what else is drawn: the best of weak matches is as dark as weak matches are."""
    picture = [np.zeros((4, 4, 3), np.uint8)]
    weak = plot_similarity_matrix(torch.tensor([[0.12], [0.15], [0.17]]), ["a", "b", "c"], picture)
    strong = plot_similarity_matrix(torch.tensor([[0.12], [0.17], [0.33]]), ["a", "b", "c"], picture)
    assert lightness(weak, 2, 0) == lightness(strong, 1, 0)
    assert lightness(weak, 2, 0) < 0.4 < 0.7 < lightness(strong, 2, 0)
    # a single picture and text are no exception, nor are probabilities
    alone = plot_similarity_matrix(torch.tensor([[0.17]]), ["a"], picture)
    assert lightness(alone, 0, 0) == lightness(weak, 2, 0)
    rare = plot_similarity_matrix(torch.tensor([[0.17]]), ["a"], picture, torch.tensor([[0.02]]))
    sure = plot_similarity_matrix(torch.tensor([[0.17]]), ["a"], picture, torch.tensor([[0.98]]))
    assert lightness(rare, 0, 0) < 0.2 < 0.7 < lightness(sure, 0, 0)
    # and the range is said
    bars = [figure.axes[1] for figure in (weak, sure)]
    assert [bar.get_ylabel() for bar in bars] == ["cosine", "probability"]
    assert [bar.get_ylim() for bar in bars] == [pytest.approx((0.1, 0.35)), pytest.approx((0, 1))]


def test_colours_begin_and_end_at_logits():
    assert cosine_range(100.0) == pytest.approx((0.1, 0.35))
    assert cosine_range(50.0) == pytest.approx((0.2, 0.7))
    for scale in (35.0, 14.3, 1.0):  # no cosine is above 1
        assert cosine_range(scale) == pytest.approx((2 / 7, 1))


def test_one_text_has_no_best():
    assert not plot_similarity_matrix(torch.ones(1, 2), ["a"], [np.zeros((4, 4, 3), np.uint8)] * 2).axes[0].lines


def test_long_texts_are_cut():
    label = plot_similarity_matrix(torch.ones(1, 1), ["word " * 100], [np.zeros((4, 4, 3), np.uint8)]).axes[0]
    text = label.get_yticklabels()[0].get_text()
    assert text.endswith("…")
    assert max(map(len, text.splitlines())) <= 36


def test_errors():
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 4\)"):
        similarity_matrix(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        similarity_matrix(torch.full((2, 3), torch.nan), torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"cosines: got \(2, 2\), expected \[1, 2\]"):
        plot_similarity_matrix(torch.ones(2, 2), ["a"], [np.zeros((4, 4, 3), np.uint8)] * 2)
    with pytest.raises(ValueError, match="at least one of each"):
        plot_similarity_matrix(torch.ones(0, 0), [], [])
