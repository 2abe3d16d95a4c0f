from __future__ import annotations

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
import small
import torch

from clipfast.data.transform import ImageError
from clipfast.embed.embed import embed
from clipfast.embed.search import check_model, encode_query, model_of, search


def drawn(n: int, width: int = 8, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(n, width)).astype(dtype)


def query(width: int = 8) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1))


def write(path, values: np.ndarray, kind: str):
    if kind == "npy":
        np.save(path.with_suffix(".npy"), values)
        return path.with_suffix(".npy")
    table = pyarrow.table({"features": list(values), "path": [f"p{i}" for i in range(len(values))]})
    parquet.write_table(table, path.with_suffix(".parquet"), row_group_size=7)
    return path.with_suffix(".parquet")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("chunk", [8, 100, 1 << 20])
def test_the_nearest_are_those_of_a_full_sort(tmp_path, kind, dtype, chunk):
    values = drawn(203, dtype=dtype)
    hits = search(write(tmp_path / "f", values, kind), query(), k=9, chunk_values=chunk)
    wide, unit = values.astype(np.float64), query().double().numpy()
    cosines = wide @ unit / np.linalg.norm(wide, axis=1) / np.linalg.norm(unit)
    order = np.argsort(-cosines)[:9]
    assert [hit.row for hit in hits] == order.tolist()
    assert [hit.cosine for hit in hits] == pytest.approx(cosines[order], abs=1e-6)
    assert [hit.rank for hit in hits] == list(range(1, 10))
    assert [hit.name for hit in hits] == ([f"p{i}" for i in order] if kind == "parquet" else [""] * 9)


def test_of_equals_the_first(tmp_path):
    values = np.repeat(drawn(5), 40, axis=0)[np.random.default_rng(2).permutation(200)]
    best = np.flatnonzero(
        (values == values[(values @ query().numpy() / np.linalg.norm(values, axis=1)).argmax()]).all(1)
    )
    for chunk in (8, 160, 1 << 20):
        hits = search(write(tmp_path / "f", values, "npy"), query(), k=3, chunk_values=chunk)
        assert [hit.row for hit in hits] == best[:3].tolist()


def test_fewer_rows_than_wanted(tmp_path):
    assert len(search(write(tmp_path / "f", drawn(3), "npy"), query(), k=10)) == 3


def test_what_was_embedded_is_found_by_itself(tmp_path):
    model = small.model()
    small.write_pictures(tmp_path / "pictures", 9)
    (tmp_path / "pictures" / "02.png").write_bytes(b"no")
    for name in ("f.npy", "f.parquet"):
        embed(model, tmp_path / "pictures", tmp_path / name, batch_size=4, model_source={"spec": "m.pt"})
        hit = search(tmp_path / name, encode_query(model, image=tmp_path / "pictures" / "05.png"), k=1)[0]
        assert (hit.row, hit.name) == (5, "05.png")
        assert hit.cosine == pytest.approx(1, abs=1e-5)
        assert model_of(tmp_path / name) == {"spec": "m.pt"}
        check_model(tmp_path / name, model)
        with pytest.raises(ValueError, match="model: got other weights"):
            check_model(tmp_path / name, small.model(seed=1))


def test_queries(tmp_path):
    import clipfast

    model = small.model()
    torch.testing.assert_close(
        encode_query(model, text="a cat"), model.encode_text(clipfast.tokenize(["a cat"], 16))[0]
    )
    for options, message in (({}, "got neither"), ({"text": "a", "image": "b"}, "got both"), ({"text": " "}, "empty")):
        with pytest.raises(ValueError, match=message):
            encode_query(model, **options)
    with pytest.raises(TypeError, match="query: got list, expected a text"):
        clipfast.search("no.npy", ["a cat"])
    (tmp_path / "x.png").write_bytes(b"no")
    with pytest.raises(ImageError, match=r"x\.png"):
        encode_query(model, image=tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_features_that_do_not_fit(tmp_path, kind):
    path = write(tmp_path / "f", drawn(20), kind)
    with pytest.raises(ValueError, match=r"features: got width 8 in .*, expected 5"):
        search(path, query(5))
    with pytest.raises(ValueError, match="k: got 0"):
        search(path, query(), k=0)
    for bad in (torch.zeros(8), torch.full((8,), torch.nan), torch.ones(2, 8)):
        with pytest.raises(ValueError, match="query: got"):
            search(path, bad)
    values = drawn(20)
    values[13, 2] = np.nan
    with pytest.raises(ValueError, match="got NaN or infinity at place 13"):
        search(write(tmp_path / "f", values, kind), query(), chunk_values=40)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"expected a whole \.npy array|got no whole Parquet file"):
        search(path, query())
    path.unlink()
    with pytest.raises(FileNotFoundError):
        search(path, query())


def test_files_of_other_kinds(tmp_path):
    parquet.write_table(pyarrow.table({"vector": [[1.0]]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"column: got vector in .*, expected .*features"):
        search(tmp_path / "other.parquet", query())
    parquet.write_table(pyarrow.table({"features": ["a"]}), tmp_path / "words.parquet")
    with pytest.raises(ValueError, match="got a column of string"):
        search(tmp_path / "words.parquet", query())
    parquet.write_table(pyarrow.table({"features": [[1.0, 2.0], [1.0]]}), tmp_path / "ragged.parquet")
    with pytest.raises(ValueError, match="not of width 2"):
        search(tmp_path / "ragged.parquet", query(2))
    np.save(tmp_path / "ints.npy", np.ones((3, 8), int))
    with pytest.raises(ValueError, match=r"got int64 \(3, 8\)"):
        search(tmp_path / "ints.npy", query())
    with pytest.raises(ValueError, match=r"expected a \.npy or \.parquet file"):
        search(tmp_path / "f.txt", query())
    with pytest.raises(ValueError, match="expected --model"):
        model_of(tmp_path / "other.parquet")
    (tmp_path / "pickle.npy").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"expected a whole \.npy array"):
        search(tmp_path / "pickle.npy", query())
