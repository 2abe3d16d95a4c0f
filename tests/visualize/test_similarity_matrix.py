from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib.offsetbox import AnnotationBbox

from clipfast.visualize.similarity_matrix import plot_similarity_matrix, similarity_matrix


def test_cosines():
    images, texts = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1)
    torch.testing.assert_close(similarity_matrix(images, texts), expected.float())


def test_what_is_drawn():
    cosines = torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.31, 0.0]])
    pictures = [np.full((20, 30 + 10 * i, 3), 50 * i, np.uint8) for i in range(3)]
    axes = plot_similarity_matrix(cosines, ["one", "two words"], pictures).axes[0]
    assert np.allclose(axes.images[0].get_array(), cosines.numpy())
    assert [text.get_text() for text in axes.texts] == ["0.90", "-0.20", "0.10", "0.30", "0.31", "0.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two words"]
    # the best text of each picture: a white frame and a blue one around its cell
    centres = [(line.get_xdata()[:4].mean(), line.get_ydata()[:4].mean()) for line in axes.lines]
    assert centres[::2] == centres[1::2]
    assert np.allclose(centres[::2], [(0, 0), (1, 1), (2, 0)])
    boxes = [artist for artist in axes.artists if isinstance(artist, AnnotationBbox)]
    assert [box.xy[0] for box in boxes] == [0, 1, 2]
    # columns are wide enough for their thumbnails
    assert len({round(max(b.offsetbox.get_data().shape) * b.offsetbox.get_zoom(), 3) for b in boxes}) == 1


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
