from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from clipfast.evaluate import ranking
from clipfast.evaluate.retrieval import retrieval_recall


def features(n: int, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_aligned_features_are_always_found():
    images = features(50)
    result = retrieval_recall(images, images * torch.rand(50, 1).add(0.1))
    assert {result[f"{way}_r{k}"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)} == {1.0}
    assert result["image_to_text_chance5"] == result["text_to_image_chance5"] == pytest.approx(0.1)


def test_recall_counts_by_hand():
    # each image's nearest text: 0 -> 0, 1 -> 2, 2 -> 1; each text's nearest image: 0 -> 0, 1 -> 2, 2 -> 1
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 1.0], [0.1, 1.0, 0.5]]), dim=-1)
    result = retrieval_recall(images, texts, ks=(1, 2, 3))
    assert [result[f"image_to_text_r{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 1.0, 1.0])
    assert [result[f"text_to_image_r{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 1.0, 1.0])


def test_the_two_directions_differ():
    def at(*degrees: float) -> torch.Tensor:
        angles = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angles.cos(), angles.sin()], dim=1)

    # image 0 is nearest to text 1 and image 1 to text 0, while both texts are nearest to image 0
    result = retrieval_recall(at(0, 60), at(25, 20), ks=(1,))
    assert result["image_to_text_r1"] == 0.0
    assert result["text_to_image_r1"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [7, 130, 1000])
def test_constant_features_come_out_at_chance(n, dtype):
    same = features(1, dim=77, dtype=torch.float64).to(dtype)
    for result in (
        retrieval_recall(same.expand(n, -1), same.expand(n, -1)),
        retrieval_recall(torch.zeros(n, 4), torch.zeros(n, 4)),
    ):
        for way in ("image_to_text", "text_to_image"):
            for k in (1, 5):
                assert result[f"{way}_r{k}"] == pytest.approx(result[f"{way}_chance{k}"]) == k / n


def test_equal_cosines_that_round_differently_are_ties():
    numbers = features(1, dim=77)[0]
    shuffled = torch.stack([numbers[torch.randperm(77, generator=torch.Generator().manual_seed(i))] for i in range(50)])
    result = retrieval_recall(torch.ones(50, 77), shuffled)
    assert result["image_to_text_r5"] == result["text_to_image_r5"] == 5 / 50


def benchmarks_recall(scores: torch.Tensor, positive: torch.Tensor, k: int) -> float:
    """clip-benchmark's definition, plainly: the share of rows with a positive pair among the k best of the row."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return positive.gather(1, order)[:, :k].any(dim=1).double().mean().item()


@pytest.mark.parametrize("chunk", [1 << 24, 500])
def test_any_number_of_captions_and_ties_by_the_definition_of_clip_benchmark(chunk, monkeypatch):
    monkeypatch.setattr(ranking, "SCORES_IN_MEMORY", chunk)
    generator = torch.Generator().manual_seed(0)
    # one to six captions a picture, in any order; few directions, so that most scores come several times
    captions = torch.randint(1, 7, (40,), generator=generator)
    image_of_text = torch.arange(40).repeat_interleave(captions)[
        torch.randperm(int(captions.sum()), generator=generator)
    ]
    directions = F.normalize(torch.randint(-1, 2, (9, 4), generator=generator).double() + 0.25, dim=-1)
    images = directions[torch.randint(9, (40,), generator=generator)]
    texts = directions[torch.randint(9, (len(image_of_text),), generator=generator)]
    texts[::3] = images[image_of_text[::3]]
    # exact scores: equal ones are equal, whatever a product's order of sums
    scores = (texts @ images.T * 2**40).round()
    positive = image_of_text[:, None] == torch.arange(40)
    result = retrieval_recall(images, texts, image_of_text=image_of_text)
    for k in (1, 5, 10):
        assert result[f"text_to_image_r{k}"] == benchmarks_recall(scores, positive, k)
        assert result[f"image_to_text_r{k}"] == benchmarks_recall(scores.T, positive.T, k)
    assert 0 < result["text_to_image_r1"] < result["text_to_image_r10"] < 1


def test_random_features_score_chance():
    result = retrieval_recall(features(4000, seed=1), features(4000, seed=2), ks=(40,))
    for way in ("image_to_text", "text_to_image"):
        assert result[f"{way}_chance40"] == pytest.approx(0.01)
        # four standard deviations of a share of 0.01 among 4000
        assert abs(result[f"{way}_r40"] - 0.01) < 4 * (0.01 / 4000) ** 0.5


def test_several_texts_an_image():
    images = torch.eye(3)
    image_of_text = torch.tensor([2, 0, 0, 1])
    # of image 0's two texts one is far; the near one counts
    texts = torch.tensor([[0.0, 0, 1], [1, 0, 0], [0, 1, 0.5], [0, 0.2, 1]])
    result = retrieval_recall(images, texts, ks=(1, 2), image_of_text=image_of_text)
    # image 1's text ranks behind text 2 among the texts; texts 2 and 3 have wrong nearest images
    assert result["image_to_text_r1"] == pytest.approx(2 / 3)
    assert result["image_to_text_r2"] == pytest.approx(1.0)
    assert result["text_to_image_r1"] == pytest.approx(2 / 4)
    # one of two right among four: 1 - 2/4; the two other images have one each: 1/4
    assert result["image_to_text_chance1"] == pytest.approx((0.5 + 0.25 + 0.25) / 3)
    assert result["image_to_text_chance2"] == pytest.approx((1 - 1 / 6 + 0.5 + 0.5) / 3)
    assert result["text_to_image_chance1"] == pytest.approx(1 / 3)


def test_an_image_without_text_is_a_candidate_only():
    images = torch.eye(3)
    result = retrieval_recall(images, images[[0, 2]], ks=(1,), image_of_text=torch.tensor([0, 2]))
    # images 0 and 2 are asked, image 1 is not
    assert result["image_to_text_r1"] == result["text_to_image_r1"] == 1
    assert result["image_to_text_chance1"] == pytest.approx(1 / 2)
    assert result["text_to_image_chance1"] == pytest.approx(1 / 3)


def test_chunks_change_nothing(monkeypatch):
    images = features(101)
    texts = images + 2 * features(101, seed=3)
    whole = retrieval_recall(images, texts)
    monkeypatch.setattr(ranking, "SCORES_IN_MEMORY", 700)
    assert retrieval_recall(images, texts) == whole
    assert 0 < whole["text_to_image_r5"] < 1


def test_k_beyond_the_candidates():
    result = retrieval_recall(features(3), features(3, seed=1), ks=(5,))
    assert result["image_to_text_r5"] == result["image_to_text_chance5"] == 1.0


@pytest.mark.parametrize(
    ("images", "texts", "options", "message"),
    [
        (features(3), features(4), {}, "4 texts for 3 images"),
        (features(3, 8), features(3, 9), {}, "got width 9, expected 8"),
        (features(0), features(0), {}, "image_features: got no rows"),
        (torch.ones(3, 3, dtype=torch.long), features(3, 3), {}, "image_features: got torch.int64"),
        (features(3), features(3) * torch.nan, {}, "text_features: got NaN"),
        (features(3), features(3), {"ks": (0,)}, "ks: got"),
        (features(3), features(3), {"image_of_text": torch.tensor([0, 1, 3])}, "got indices 0 to 3, expected 0 to 2"),
        (features(3), features(3), {"image_of_text": torch.tensor([0, 1])}, r"expected integers \[3\]"),
    ],
)
def test_errors(images, texts, options, message):
    with pytest.raises(ValueError, match=message):
        retrieval_recall(images, texts, **options)
