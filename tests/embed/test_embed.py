from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import small
import torch
import torch.nn.functional as F

import clipfast
from clipfast.data.model_inputs import picture_loader
from clipfast.embed import embed as embedding
from clipfast.embed.embed import embed
from clipfast.embed.search import search
from clipfast.embed.writer import read_about, read_skipped
from clipfast.evaluate.features import Encoder, picture_encoder


@pytest.fixture
def folder(tmp_path):
    small.write_pictures(tmp_path / "pictures", 23)
    (tmp_path / "pictures" / "03.png").write_bytes(b"\x89PNG no picture")
    (tmp_path / "pictures" / "04.png").write_bytes((tmp_path / "pictures" / "05.png").read_bytes()[:200])
    return tmp_path / "pictures"


def run(folder: Path, output: str, **options):
    sizes = {"batch_size": 2, "batches_per_part": 2} | options
    return embed(small.model(), folder, folder.parent / output, **sizes)


def expected_features(rows: list[int]) -> torch.Tensor:
    model = small.model()
    pixels = torch.stack([picture_loader(model)(small.picture(row)) for row in rows])
    return F.normalize(model.encode_image(pixels), dim=-1)


def bits(folder: Path, output: str) -> dict[str, bytes]:
    stem = output.split(".")[0]
    return {path.name: path.read_bytes() for path in folder.parent.iterdir() if path.name.startswith(stem + ".")}


def caption(row: int) -> str:
    return f"a {small.WORDS[row % 8]} thing, number {row}"


ROWS = [row for row in range(23) if row not in (3, 4)]


def test_npy(folder):
    result = run(folder, "f.npy")
    values = np.load(folder.parent / "f.npy")
    assert (result.rows, result.computed, values.dtype) == (21, 23, np.float32)
    torch.testing.assert_close(torch.from_numpy(values), expected_features(ROWS))
    about, *names = map(json.loads, (folder.parent / "f.npy.names.jsonl").read_text().splitlines())
    assert names == [[row, f"{row:02d}.png", caption(row)] for row in ROWS]
    assert about["count"] == 21
    assert about["width"] == 16
    assert about["kind"] == "image"
    assert [(row, name) for row, name, _ in result.skipped] == [(3, "03.png"), (4, "04.png")]
    skipped = list(map(json.loads, (folder.parent / "f.npy.skipped.jsonl").read_text().splitlines()))
    assert [(s["row"], s["name"], s["reason"]) for s in skipped] == result.skipped
    assert "ImageError" in skipped[1]["reason"]
    left = sorted(p.name for p in folder.parent.iterdir())
    assert left == ["f.npy", "f.npy.names.jsonl", "f.npy.skipped.jsonl", "pictures"]


def test_outputs_of_one_stem_share_no_files(folder):
    """What one leaves out is not what another left out."""
    run(folder, "f.npy")
    before = {p.name: p.read_bytes() for p in folder.parent.iterdir() if p.is_file()}
    (folder / "07.png").write_bytes(b"bad")
    (folder / "03.png").unlink()
    result = run(folder, "f.parquet")
    assert [row for row, _, _ in result.skipped] == [3, 6]
    assert [row for row, _, _ in read_skipped(folder.parent / "f.parquet")] == [3, 6]
    assert [row for row, _, _ in read_skipped(folder.parent / "f.npy")] == [3, 4]
    run(folder, "f.parquet", restart=True)
    assert {name: (folder.parent / name).read_bytes() for name in before} == before
    hits = search(folder.parent / "f.npy", expected_features([9])[0], k=1)
    assert (hits[0].row, hits[0].name) == (9, "09.png")


@pytest.mark.skipif(os.name != "posix", reason="names are bytes on POSIX alone")
@pytest.mark.parametrize("output", ["f.npy", "f.parquet"])
def test_names_that_are_not_utf8_and_lone_surrogates(folder, output):
    (folder / "00.png").rename(folder / "caf\udce9.png")
    result = run(folder, output)
    assert result.rows == 21
    last = search(folder.parent / output, expected_features([0])[0], k=1)[0]
    assert last.name == ("caf\udce9.png" if output == "f.npy" else "caf\\udce9.png")
    assert run(folder, output).computed == 0
    (folder.parent / "t.csv").write_bytes(b"filepath,title\nx.png,a cat\n")
    (folder.parent / "list.txt").write_bytes(b"pictures/caf\xe9.png\npictures/05.png\n")
    result = run(folder.parent / "list.txt", "g" + output[1:])
    assert (result.rows, result.skipped) == (2, [])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parquet(folder, dtype):
    run(folder, "f.parquet", dtype=dtype)
    table = parquet.read_table(folder.parent / "f.parquet")
    assert table.schema.names == ["row", "path", "caption", "features"]
    assert table["row"].to_pylist() == ROWS
    assert table["path"].to_pylist() == [f"{row:02d}.png" for row in ROWS]
    assert table["caption"].to_pylist() == [caption(row) for row in ROWS]
    values = np.stack(table["features"].to_numpy())
    assert values.dtype == dtype
    close = {"rtol": 0, "atol": 1e-3 if dtype == "float16" else 1e-6}
    torch.testing.assert_close(torch.from_numpy(values).float(), expected_features(ROWS), **close)
    assert read_about(folder.parent / "f.parquet")["weights"]


def test_features_are_the_same_in_both_formats_and_without_threads(folder):
    run(folder, "f.npy")
    run(folder, "g.parquet", workers=0)
    values = np.stack(parquet.read_table(folder.parent / "g.parquet")["features"].to_numpy())
    assert np.array_equal(np.load(folder.parent / "f.npy"), values)


def test_texts_and_features_of_any_length(tmp_path):
    texts = [f"text {'word ' * (i % 5)}{i}" for i in range(9)]
    (tmp_path / "t.txt").write_text("\n".join(texts))
    embed(small.model(), tmp_path / "t.txt", tmp_path / "t.parquet", kind="text", batch_size=4, normalize=False)
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table["text"].to_pylist() == texts
    expected = small.model().encode_text(clipfast.tokenize(texts, 16))
    torch.testing.assert_close(torch.from_numpy(np.stack(table["features"].to_numpy())), expected)


class Stop(Exception):
    pass


@pytest.mark.parametrize("output", ["f.npy", "f.parquet"])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_run_goes_on_with_the_same_bits(folder, output, after, monkeypatch):
    run(folder, output)
    whole = bits(folder, output)
    for path in folder.parent.glob("f.*"):
        path.unlink()

    encode_rows, calls = embedding.encode_rows, []

    def stopping(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise Stop
        return encode_rows(*arguments, **options)

    monkeypatch.setattr(embedding, "encode_rows", stopping)
    with pytest.raises(Stop):
        run(folder, output)
    assert not (folder.parent / output).exists()
    monkeypatch.setattr(embedding, "encode_rows", encode_rows)
    assert run(folder, output).computed == 23 - 4 * after
    assert bits(folder, output) == whole
    # and once it is complete nothing is computed
    again = run(folder, output)
    assert (again.computed, again.rows, len(again.skipped)) == (0, 21, 2)


def test_what_another_run_left_is_not_taken_over(folder, monkeypatch):
    def stop(*arguments, **options):
        raise Stop

    monkeypatch.setattr(embedding, "encode_rows", stop)
    with pytest.raises(Stop):
        run(folder, "f.npy")
    with pytest.raises(ValueError, match=r"parts of another run in .*f\.npy\.parts \(normalize changed\)"):
        run(folder, "f.npy", normalize=False)
    monkeypatch.undo()
    run(folder, "f.npy")
    with pytest.raises(ValueError, match=r"of another run \(normalize differ\)"):
        run(folder, "f.npy", normalize=False)
    small.picture(77).save(folder / "77.png")
    with pytest.raises(ValueError, match=r"of another run \(source differ\)"):
        run(folder, "f.npy")
    assert run(folder, "f.npy", restart=True).rows == 22
    with pytest.raises(ValueError, match=r"\(weights differ\)"):
        embed(small.model(seed=1), folder, folder.parent / "f.npy", batch_size=2)


def test_rows_that_cannot_be_read_change_no_others_bits(folder, monkeypatch):
    def by_place(model: clipfast.CLIP) -> Encoder:
        """Features that depend on the size of the batch and the place in it, as those of some products do."""
        encoder = picture_encoder(model)
        places = torch.arange(9.0)[:, None]
        return replace(encoder, encode=lambda batch: encoder.encode(batch) + len(batch) + places[: len(batch)])

    monkeypatch.setattr(embedding, "picture_encoder", by_place)
    run(folder, "f.npy")
    before = np.load(folder.parent / "f.npy")
    (folder / "10.png").write_bytes(b"no")
    run(folder, "g.npy")
    assert np.array_equal(np.load(folder.parent / "g.npy"), np.delete(before, ROWS.index(10), axis=0))


def test_mistakes(folder):
    with pytest.raises(ValueError, match=r"expected a name that ends with \.parquet or \.npy"):
        run(folder, "f.csv")
    with pytest.raises(ValueError, match="dtype: got 'bfloat16'"):
        run(folder, "f.npy", dtype="bfloat16")
    with pytest.raises(ValueError, match="batch_size, batches_per_part: got 0 and 2"):
        run(folder, "f.npy", batch_size=0)
    for path in folder.glob("*.png"):
        path.write_bytes(b"no")
    for source in (None, ["a.png"]):
        with pytest.raises(TypeError, match=f"source: got {type(source).__name__}, expected a path or a name"):
            embed(small.model(), source, folder.parent / "f.npy")
    with pytest.raises(TypeError, match=r"model: got NoneType, expected a clipfast\.CLIP"):
        embed(None, folder, folder.parent / "f.npy")
    with pytest.raises(ValueError, match="got no row that could be read, .* the first: ImageError"):
        run(folder, "f.npy")
    assert not bits(folder, "f.npy")  # no parts either, which other arguments would stumble over


_SLOWLY = """
import sys, time, torch
from clipfast.embed import embed as embedding
from clipfast.models.open_model import open_model
torch.set_num_threads(1)
compute = embedding.encode_rows
def slowly(*arguments, **options):
    time.sleep(0.05)  # so that there is something to kill
    return compute(*arguments, **options)
embedding.encode_rows = slowly
model = open_model(sys.argv[1], device="cpu")
done = embedding.embed(model, sys.argv[2], sys.argv[3], batch_size=2, batches_per_part=1)
print(done.computed)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
@pytest.mark.slow
def test_killed_at_any_moment(folder):
    checkpoint = small.run(folder.parent / "run")
    command = [sys.executable, "-c", _SLOWLY, str(checkpoint), str(folder)]
    subprocess.run([*command, str(folder.parent / "whole.npy")], check=True, capture_output=True)
    output, parts = folder.parent / "f.npy", folder.parent / "f.npy.parts"
    kills = 0
    for wanted in (1, 7):
        process = subprocess.Popen([*command, str(output)], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list(parts.glob("*.npz"))) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += not output.exists()
    assert kills == 2
    done = subprocess.run([*command, str(output)], check=True, capture_output=True, text=True)
    assert int(done.stdout) <= 23 - 2 * 7
    assert output.read_bytes() == (folder.parent / "whole.npy").read_bytes()
    names = [(folder.parent / f"{stem}.npy.names.jsonl").read_text().splitlines() for stem in ("f", "whole")]
    assert names[0] == names[1]
    assert not parts.exists()
