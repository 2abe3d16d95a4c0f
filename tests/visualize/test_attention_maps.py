from __future__ import annotations

import numpy as np
import pytest
import torch

import clipfast
from clipfast.visualize.attention_maps import attention_rollout, class_attention, plot_attention_maps, plot_heads


def test_rollout_by_hand():
    # one image, two tokens beside the class token
    first = torch.tensor([[0.2, 0.8, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    second = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    shares = attention_rollout(torch.stack([first, second])[:, None, None])
    kept = [0.5 * m + 0.5 * torch.eye(3) for m in (first, second)]
    row = (kept[1] @ kept[0])[0, 1:]
    torch.testing.assert_close(shares, (row / row.sum())[None])


def test_the_patch_that_is_looked_at_gets_the_share():
    attention = torch.full((3, 2, 4, 10, 10), 0.1)
    attention[:, 1, :, :, :] = 0
    attention[:, 1, :, :, 7] = 1
    shares = attention_rollout(attention)
    assert shares.shape == (2, 9)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2))
    torch.testing.assert_close(shares[0], torch.full((9,), 1 / 9))
    assert shares[1].argmax() == 6
    assert shares[1, 6] > 0.99


def test_rollout_takes_what_vit_gives():
    vit = clipfast.ViT(image_size=16, patch_size=4, width=32, layers=2, heads=2, output_dim=8)
    shares = attention_rollout(vit.get_attention_maps(torch.randn(3, 3, 16, 16)))
    assert shares.shape == (3, 16)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(3))


def test_rollout_from_what_is_pooled():
    attention = torch.rand(2, 3, 4, 9, 9).softmax(dim=-1)
    # the class token by its weights, and by default
    one = torch.zeros(3, 9)
    one[:, 0] = 1
    torch.testing.assert_close(attention_rollout(attention, one), attention_rollout(attention))
    torch.testing.assert_close(class_attention(attention, 0, one), class_attention(attention, 0))
    vit = clipfast.ViT(16, 4, 32, 2, 2, output_dim=8, pool_type="map", class_token=False)
    images = torch.randn(3, 3, 16, 16)
    attention, read = vit.get_attention_maps(images), vit.get_pool_weights(images).mean(dim=1)
    shares = attention_rollout(attention, read, 0)
    kept = 0.5 * attention.mean(dim=2) + 0.5 * torch.eye(16)
    torch.testing.assert_close(shares, (read[:, None] @ kept[1] @ kept[0])[:, 0])
    heads = class_attention(attention, 1, read, 0)
    torch.testing.assert_close(heads, (read[:, None, None] @ attention[1])[:, :, 0])
    with pytest.raises(ValueError, match="read: got shape"):
        attention_rollout(attention, read[:, 1:], 0)


def test_plot_lays_maps_over_pictures():
    pictures = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    shares = torch.zeros(3, 4)
    shares[:, 3] = 1  # the lower right quarter
    figure = plot_attention_maps(pictures, shares, (2, 2), captions=["a", "b", "c"])
    shown = [axes for axes in figure.axes if axes.images]
    assert len(shown) == 6
    assert np.array_equal(shown[2].images[0].get_array(), pictures[1])
    heat = np.asarray(shown[3].images[1].get_array())
    assert heat.shape == (16, 16)
    assert heat[8:, 8:].mean() > 0.7 > 0.2 > heat[:8, :8].mean()
    assert [axes.get_title(loc="left") for axes in shown[::2]] == ["a", "b", "c"]


def test_a_map_that_is_nearly_even_looks_even():
    pictures = np.zeros((2, 16, 16, 3), np.uint8)
    shares = torch.tensor([[0.24, 0.25, 0.25, 0.26], [0.0, 0.0, 0.0, 1.0]])
    figure = plot_attention_maps(pictures, shares, (2, 2))
    even, peaked = (axes.images[1] for axes in figure.axes if len(axes.images) == 2)
    assert np.max(even.get_alpha()) < 0.1 < 0.7 < np.max(peaked.get_alpha())


def test_class_attention_is_the_class_tokens_row():
    vit = clipfast.ViT(image_size=16, patch_size=4, width=32, layers=2, heads=2, output_dim=8)
    attention = vit.get_attention_maps(torch.randn(3, 3, 16, 16))
    for block in (0, -1):
        heads = class_attention(attention, block)
        assert heads.shape == (3, 2, 16)
        torch.testing.assert_close(heads.sum(dim=-1), 1 - attention[block, :, :, 0, 0])
        assert torch.equal(heads[1, 0], attention[block, 1, 0, 0, 1:])


@pytest.mark.parametrize(("count", "places"), [(3, 6), (12, 15), (16, 20)])
def test_every_head_is_plotted(count, places):
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    heads = torch.eye(4)[torch.arange(count) % 4]
    figure = plot_heads(picture, heads, torch.tensor([0.0, 0, 0, 1]), (2, 2), caption="a caption")
    shown = [axes for axes in figure.axes if axes.images]
    assert len(figure.axes) == places
    titles = [axes.get_title(loc="left") for axes in shown]
    assert titles == ["picture", "rollout", "mean of the heads", *(f"head {i}" for i in range(count))]
    heat = [np.asarray(axes.images[1].get_array()) for axes in shown[1:]]
    assert heat[0][8:, 8:].mean() > 0.7  # the rollout's is the lower right quarter
    assert heat[2][:8, :8].mean() > 0.7  # head 0's the upper left
    assert heat[3][:8, 8:].mean() > 0.7


def test_errors():
    with pytest.raises(ValueError, match="block: got 2, expected -2 to 1"):
        class_attention(torch.ones(2, 1, 1, 3, 3), 2)
    with pytest.raises(ValueError, match=r"got shape \(2, 3, 3\)"):
        class_attention(torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match=r"heads, rollout: got \(2, 5\) and \(4,\)"):
        plot_heads(np.zeros((8, 8, 3), np.uint8), torch.ones(2, 5), torch.ones(4), (2, 2))
    with pytest.raises(ValueError, match=r"attention: got shape \(2, 3, 3\)"):
        attention_rollout(torch.ones(2, 3, 3))
    with pytest.raises(ValueError, match=r"shares: got shape \(1, 9\), expected \[1, 2·2\]"):
        plot_attention_maps(np.zeros((1, 8, 8, 3), np.uint8), torch.ones(1, 9), (2, 2))
