from __future__ import annotations

import pytest
import small
import torch

from clipfast.data.model_inputs import picture_loader
from clipfast.data.sources import PairError
from clipfast.evaluate.features import Encoder, encode_rows, picture_encoder, text_encoder


def counting_encoder(batches: list[list[float]]) -> Encoder:
    def encode(batch: torch.Tensor) -> torch.Tensor:
        batches.append(batch[:, 0].tolist())
        return batch

    return Encoder(torch.stack, encode, torch.full((2,), -1.0))


def load(row: int) -> torch.Tensor | None:
    if row % 5 == 3:
        raise PairError(f"row {row}")
    return None if row == 6 else torch.tensor([float(row), 1.0])


def test_broken_rows_are_left_out():
    batches: list[list[float]] = []
    seen = []
    got = encode_rows(counting_encoder(batches), load, range(10), batch_size=3, on_rows=seen.append)
    assert got.rows == [0, 1, 2, 4, 5, 7, 9]
    assert got.features[:, 0].tolist() == got.rows
    assert got.skipped == {3: "PairError: row 3", 8: "PairError: row 8"}
    assert batches == [[0, 1, 2], [4, 5, 7], [9]]
    assert sum(seen) == 10


def test_fixed_batches_keep_their_places():
    batches: list[list[float]] = []
    got = encode_rows(
        counting_encoder(batches), lambda r: load(r if r != 6 else 3), range(10), batch_size=3, fixed_batches=True
    )
    assert got.rows == [0, 1, 2, 4, 5, 7, 9]
    assert got.features[:, 0].tolist() == got.rows
    assert batches == [[0, 1, 2], [-1, 4, 5], [-1, 7, -1], [9]]


def test_nothing_that_can_be_read():
    got = encode_rows(counting_encoder([]), lambda row: load(3), range(4), batch_size=2, fixed_batches=True)
    assert got.rows == []
    assert got.features.shape == (0, 0)
    assert len(got.skipped) == 4


def test_features_are_the_models():
    model = small.model()
    pixels = [picture_loader(model)(small.picture(i)) for i in range(5)]
    got = encode_rows(picture_encoder(model), pixels.__getitem__, range(5), batch_size=2)
    torch.testing.assert_close(got.features, model.encode_image(torch.stack(pixels)))
    texts = ["a cat", "two dogs and more words", ""]
    got = encode_rows(text_encoder(model), texts.__getitem__, range(3), batch_size=2)
    import clipfast

    torch.testing.assert_close(got.features, model.encode_text(clipfast.tokenize(texts, 16)))


def test_features_that_are_not_finite():
    encoder = Encoder(torch.stack, lambda batch: batch / (batch - 2), torch.zeros(1))
    with pytest.raises(ValueError, match="got NaN or infinity for row 2"):
        encode_rows(encoder, lambda row: torch.tensor([float(row)]), range(5), batch_size=2)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        encode_rows(encoder, lambda row: torch.zeros(1), range(5), batch_size=0)
