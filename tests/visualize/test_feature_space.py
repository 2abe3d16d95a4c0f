from __future__ import annotations

import sys
import types

import numpy as np
import pytest
import torch

from clipfast.visualize.feature_space import plot_feature_space, project_features


@pytest.fixture(scope="module")
def clusters():
    """Three groups of pairs; texts lie a constant offset away from their images, as CLIP's modalities do."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator)
    images = centres.repeat_interleave(12, dim=0) + 0.1 * torch.randn(36, 16, generator=generator)
    texts = images + 0.05 * torch.randn(36, 16, generator=generator) + 6 * torch.ones(16)
    return images, texts


def test_pairs_are_neighbours_and_groups_stay_together(clusters):
    image_points, text_points = project_features(*clusters, perplexity=8)
    assert image_points.shape == text_points.shape == (36, 2)
    distances = np.linalg.norm(image_points[:, None] - text_points[None], axis=-1)
    nearest_group = distances.argmin(axis=1) // 12
    assert (nearest_group == np.arange(36) // 12).all()
    own = np.diag(distances).mean()
    assert own < 0.25 * distances.mean()


def test_without_centring_the_modality_gap_shows(clusters):
    image_points, text_points = project_features(*clusters, perplexity=8, center=False)
    everyone = np.concatenate([image_points, text_points])
    distances = np.linalg.norm(everyone[:, None] - everyone[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    same_modality = (distances.argmin(axis=1) < 36) == (np.arange(72) < 36)
    assert same_modality.mean() > 0.95


def test_same_seed_same_plane(clusters):
    first, second = project_features(*clusters), project_features(*clusters)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_few_pairs_are_laid_out_too():
    points, _ = project_features(torch.randn(3, 4), torch.randn(3, 4))
    assert np.isfinite(points).all()


def test_every_pair_is_joined(clusters):
    points = np.random.default_rng(0).normal(size=(2, 36, 2))
    pictures = np.zeros((36, 8, 8, 3), np.uint8)
    for drawn in (None, pictures):
        axes = plot_feature_space(points[0], points[1], drawn).axes[0]
        lines = axes.collections[0].get_segments()
        assert np.allclose(lines, np.stack(points, axis=1))
        low, high = np.array([axes.get_xlim(), axes.get_ylim()]).T
        assert (points >= low).all()
        assert (points <= high).all()


def test_errors():
    with pytest.raises(ValueError, match=r"got \(5, 4\) and \(4, 4\)"):
        project_features(torch.randn(5, 4), torch.randn(4, 4))
    with pytest.raises(ValueError, match="at least 3 pairs"):
        project_features(torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match="NaN"):
        project_features(torch.full((5, 4), torch.nan), torch.randn(5, 4))
    with pytest.raises(ValueError, match="method: got 'pca'"):
        project_features(torch.randn(5, 4), torch.randn(5, 4), method="pca")


def test_umap_where_it_is_installed(clusters, monkeypatch):
    class Umap:
        def __init__(self, **options):
            assert options == {"n_neighbors": 20, "metric": "cosine", "random_state": 3}

        def fit_transform(self, points):
            return points[:, :2]

    monkeypatch.setitem(sys.modules, "umap", types.SimpleNamespace(UMAP=Umap))
    image_points, text_points = project_features(*clusters, method="umap", seed=3)
    assert image_points.shape == text_points.shape == (36, 2)
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ImportError, match="pip install umap-learn"):
        project_features(*clusters, method="umap")


def test_captions_beside_their_points(clusters):
    points = np.random.default_rng(0).normal(size=(2, 3, 2))
    axes = plot_feature_space(points[0], points[1], None, ["a", "b", "word " * 30]).axes[0]
    assert [list(text.xy) for text in axes.texts] == points[1].tolist()
    assert [text.get_text() for text in axes.texts][:2] == ["a", "b"]
    assert len(axes.texts[2].get_text()) < 52
