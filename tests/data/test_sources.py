from __future__ import annotations

import ast
import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfast.data import sources
from clipfast.data.shard_index import scan_shard
from clipfast.data.shards import ShardedPairs, write_shards
from clipfast.data.sources import Pair, PairError, open_pairs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CLIPFAST_CACHE", str(tmp_path_factory.mktemp("cache")))


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def some_pairs(count: int) -> list[Pair]:
    return [Pair(f"pair {i}", picture(i), f"caption {i} – ünïcode") for i in range(count)]


def contents(source) -> list[tuple[bytes, str]]:
    return [source.read(i)[1:3] for i in range(len(source))]


def test_shards_hold_what_was_written(tmp_path):
    pairs = some_pairs(25)
    shards = write_shards(pairs, tmp_path / "shards", shard_size=10)
    assert [p.name for p in shards] == ["00000.tar", "00001.tar", "00002.tar"]
    for path in (tmp_path / "shards", tmp_path / "shards" / "0000{0..2}.tar", "::".join(map(str, shards))):
        source = open_pairs(path)
        assert list(source.groups) == [10, 10, 5]
        assert contents(source) == [(p.image, p.caption) for p in pairs]
    # the count comes from the cache the second time; the samples do not
    assert contents(open_pairs(tmp_path / "shards")) == contents(source)


def test_webdataset_reads_what_was_written(tmp_path):
    import webdataset

    pairs = some_pairs(5)
    shards = write_shards(pairs, tmp_path, shard_size=3)
    samples = list(webdataset.WebDataset([str(p) for p in shards], shardshuffle=False))
    assert [(s["png"], s["txt"].decode()) for s in samples] == [(p.image, p.caption) for p in pairs]


def test_samples_of_other_writers(tmp_path):
    """Folders in names, other files beside the pair, captions in JSON alone."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in (
            ("x/one.jpg", b"one"),
            ("x/one.cls", b"3"),
            ("x/one.json", b'{"caption": "the first", "width": 3}'),
            ("x/two.JPEG", b"two"),
            ("x/two.txt", b"the second"),
            ("README", b"no extension"),
            ("x/three.txt", b"no picture"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_pairs(path)
    assert [source.read(i) for i in (0, 1)] == [
        Pair("a.tar/x/one", b"one", "the first"),
        Pair("a.tar/x/two", b"two", "the second"),
    ]
    with pytest.raises(PairError, match=r"a.tar/x/three: got txt, expected a picture"):
        source.read(2)


@pytest.mark.parametrize("kept", [0.02, 0.35, 0.5, 0.77, 0.99])
def test_a_shard_that_was_cut_short_gives_its_whole_samples(tmp_path, kept):
    pairs = some_pairs(20)
    (path,) = write_shards(pairs, tmp_path)
    whole = path.read_bytes()
    # the last blocks of a tar are zeros
    end = max(first + length for s in scan_shard(path)[0] for _, first, length in s.parts)
    path.write_bytes(whole[: int(kept * end)])
    samples, problem = scan_shard(path)
    assert problem is not None
    assert len(samples) <= 20
    if not samples:
        assert kept < 0.1
        return
    with pytest.warns(UserWarning, match="broken"):
        source = ShardedPairs([path])
    assert len(source) >= int(20 * kept) - 2
    assert contents(source) == [(p.image, p.caption) for p in pairs[: len(source)]]


@pytest.mark.parametrize("what", ["a bit", "zeros", "a part gone", "another archive behind it"])
def test_damage_in_the_middle_of_a_shard_is_named(tmp_path, what):
    """``tarfile`` takes a header that it cannot read for the end."""
    (path,) = write_shards(some_pairs(20), tmp_path)
    data = bytearray(path.read_bytes())
    first = min(first for _, first, _ in scan_shard(path)[0][9].parts)
    header = first - 512
    if what == "a bit":
        data[header + 3] ^= 1
    elif what == "zeros":
        data[header : header + 512] = bytes(512)
    elif what == "a part gone":
        del data[header - 100 : header]
    else:
        data += bytes(data)
    path.write_bytes(data)
    samples, problem = scan_shard(path)
    assert re.search(r"damaged at byte \d+: the \d+ bytes from there on are not read", problem)
    assert len(samples) == (20 if what.startswith("another") else 9)
    with pytest.warns(UserWarning, match=r"00000.tar: it is damaged at byte"):
        source = ShardedPairs([path])
    assert [pair.key for pair in map(source.read, range(len(source)))][:9] == [f"00000.tar/{i:09d}" for i in range(9)]


def test_missing_and_remote_shards(tmp_path):
    write_shards(some_pairs(3), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards are missing, the first is .*00001.tar"):
        open_pairs(tmp_path / "0000{0..2}.tar")
    with pytest.raises(ValueError, match=r"got s3://bucket/0.tar, expected files"):
        open_pairs("s3://bucket/{0..1}.tar")
    with pytest.raises(ValueError, match="holds shards already"):
        write_shards(some_pairs(1), tmp_path)
    with pytest.raises(FileNotFoundError, match="none is there"):
        open_pairs(tmp_path / "nothing")


def test_a_shard_that_goes_away_is_an_error_of_its_pairs(tmp_path):
    write_shards(some_pairs(4), tmp_path, shard_size=2)
    source = open_pairs(tmp_path)
    (tmp_path / "00001.tar").unlink()
    assert source.read(1).caption.startswith("caption 1")
    with pytest.raises(PairError, match=r"00001.tar: changed or gone"):
        source.read(2)
    # one that is cut while a run reads it
    os.truncate(tmp_path / "00000.tar", 1700)
    with pytest.raises(PairError, match=r"00000.tar: changed or gone since it was counted: got 0 samples, expected 2"):
        source.read(0)


@pytest.mark.parametrize(("suffix", "comma", "quote"), [("csv", ",", '"'), ("tsv", "\t", "")])
def test_tables(tmp_path, suffix, comma, quote):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    rows = [
        f"filepath{comma}title",
        *(f"{i}.png{comma}{quote}caption, {i}{quote}" for i in range(3)),
        f"gone.png{comma}lost",
    ]
    table = tmp_path / f"pairs.{suffix}"
    table.write_text("\n".join(rows))
    source = open_pairs(table)
    assert [source.read(i)[1:3] for i in range(3)] == [(picture(i), f"caption, {i}") for i in range(3)]
    with pytest.raises(PairError, match=r"gone.png"):
        source.read(3)
    table.write_text("a,b\n1,2\n".replace(",", comma))
    with pytest.raises(ValueError, match="got the columns a, b"):
        open_pairs(table)


def test_folders(tmp_path):
    (tmp_path / "below").mkdir()
    for name, i in (("a.png", 0), ("below/b.PNG", 1), ("alone.png", 2)):
        (tmp_path / name).write_bytes(picture(i))
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "below" / "b.txt").write_text("second")
    assert contents(open_pairs(tmp_path)) == [(picture(0), "first"), (picture(1), "second")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got no pairs"):
        open_pairs(tmp_path / "empty")


def test_imports_run_downwards():
    """No file of the room imports one that imports it, at once or on a way through others."""
    files = {f"clipfast.data.{path.stem}": path for path in Path(sources.__file__).parent.glob("*.py")}
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in files.items()}
    imports = {
        name: {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        for name, tree in trees.items()
    }
    below = {name: found & files.keys() for name, found in imports.items()}
    assert below["clipfast.data.sources"] > {"clipfast.data.shards", "clipfast.data.parquet_pairs"}
    while below:
        leaves = [name for name, found in below.items() if not found & below.keys()]
        assert leaves, f"these import each other: {sorted(below)}"
        for name in leaves:
            del below[name]
