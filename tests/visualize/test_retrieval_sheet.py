from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from clipfast.visualize.retrieval_sheet import nearest_captions, retrieval_sheet


def test_nearest_captions_by_hand():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    texts = torch.tensor([[0.0, 5.0], [1.0, 1.0]])
    first, second = nearest_captions(images, texts, [0, 1], k=5)
    assert first.nearest == [1, 0]
    assert first.cosines == pytest.approx([0.5**0.5, 0.0])
    assert (first.rank, second.rank) == (2, 2)
    assert second.nearest == [0, 1]


def test_equals_are_before_the_right_caption():
    (found,) = nearest_captions(torch.ones(4, 3), torch.ones(4, 3), [2], k=1)
    assert found.rank == 4
    assert len(found.nearest) == 1


def test_sheet_marks_what_is_right_and_names_what_was_missed():
    features = torch.eye(6)
    texts = features[[0, 2, 1, 3, 4, 5]]
    captions = ["<tiger> & co", "ox", "cat", "dog", "owl", "elk"]
    pictures = np.zeros((6, 4, 4, 3), np.uint8)
    queries = [0, 1]
    html = retrieval_sheet(pictures, captions, queries, nearest_captions(features, texts, queries, k=1))
    found, missed = html.split("</figure>")[:2]
    assert re.search(r'<li class="right"><span>&lt;tiger&gt; &amp; co</span>', found)
    assert "missed" not in found
    assert '<li class="right">' not in missed
    assert "<span>cat</span>" in missed
    assert re.search(r'<p class="missed">right: ox <small>rank 6</small>', missed)
    assert html.count('src="data:image/png;base64,') == 2
