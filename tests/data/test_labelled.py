from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image

from clipfast.data.labelled import has_labels, open_labelled
from clipfast.data.shipped import ScikitImagePairs
from clipfast.data.sources import PairError


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate(("tabby_cat/a.png", "tabby_cat/deep/b.png", "dog/c.jpg")):
        path = tmp_path / "classes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small.picture(seed).save(path)
    (tmp_path / "classes" / "empty").mkdir()
    (tmp_path / "classes" / ".hidden").mkdir()
    return tmp_path / "classes"


def write_shard(path: Path, samples: list[dict[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            for extension, data in sample.items():
                member = tarfile.TarInfo(f"{index:05d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def png(seed: int) -> bytes:
    file = io.BytesIO()
    small.picture(seed).save(file, "PNG")
    return file.getvalue()


def test_a_folder_of_classes(folder):
    source = open_labelled(folder)
    assert source.class_names == ["dog", "empty", "tabby cat"]
    assert source.labels == [0, 2, 2]
    assert [Path(source.name(i)).name for i in range(3)] == ["c.jpg", "a.png", "b.png"]
    assert source.read(1) == (folder / "tabby_cat" / "a.png").read_bytes()
    assert has_labels(str(folder))


def test_it_agrees_with_torchvision(folder):
    from torchvision.datasets import ImageFolder

    (folder / "empty").rmdir()
    (folder / ".hidden").rmdir()
    theirs, ours = ImageFolder(folder), open_labelled(folder)
    assert [(ours.name(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples


def test_names_from_a_file(folder, tmp_path):
    (tmp_path / "n.txt").write_text("a dog\nnothing\n\na cat\n")
    assert open_labelled(folder, tmp_path / "n.txt").class_names == ["a dog", "nothing", "a cat"]
    (tmp_path / "n.json").write_text(json.dumps({"tabby_cat": "cat", "dog": "hound", "empty": "void", "other": "x"}))
    assert open_labelled(folder, tmp_path / "n.json").class_names == ["hound", "void", "cat"]
    (tmp_path / "few.txt").write_text("one\n")
    with pytest.raises(ValueError, match="class_names: got 1 names, expected 3"):
        open_labelled(folder, tmp_path / "few.txt")
    (tmp_path / "few.json").write_text(json.dumps({"dog": "hound"}))
    with pytest.raises(ValueError, match="got no name for 'empty'"):
        open_labelled(folder, tmp_path / "few.json")
    (tmp_path / "bad.json").write_text("[1, 2, 3]")
    with pytest.raises(ValueError, match="expected a JSON list of names"):
        open_labelled(folder, tmp_path / "bad.json")


@pytest.mark.parametrize("place", ["test", "."])
def test_shards_with_classes(tmp_path, place):
    write_shard(tmp_path / "test" / "0.tar", [{"png": png(0), "cls": b"1"}, {"webp": png(1), "cls": b"0\n"}])
    write_shard(tmp_path / "test" / "1.tar", [{"cls": b"1"}])
    (tmp_path / place / "classnames.txt").write_text("cat\ndog\n")
    source = open_labelled(tmp_path / "test")
    assert (source.class_names, source.labels) == (["cat", "dog"], [1, 0, 1])
    assert [source.read(0), source.read(1)] == [png(0), png(1)]
    assert source.name(1) == "0.tar/00001"
    with pytest.raises(PairError, match="1.tar/00000: got cls, expected a picture"):
        source.read(2)
    assert has_labels(str(tmp_path / "test"))


def test_shards_that_do_not_fit(tmp_path):
    write_shard(tmp_path / "0.tar", [{"png": png(0), "cls": b"2"}])
    with pytest.raises(ValueError, match="class_names: got none"):
        open_labelled(tmp_path / "0.tar")
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"got class b'2' of 00000 .* expected a number 0 to 1"):
        open_labelled(tmp_path / "0.tar")
    write_shard(tmp_path / "0.tar", [{"png": png(0), "txt": b"a"}])
    with pytest.raises(ValueError, match=r"expected a \.cls"):
        open_labelled(tmp_path / "0.tar")
    assert not has_labels(str(tmp_path / "0.tar"))


def test_digits():
    source = open_labelled("digits")
    assert len(source) == 1797
    assert source.class_names[source.labels[0]] == "zero"
    drawn = np.asarray(source.read(0))
    assert isinstance(source.read(0), Image.Image)
    assert drawn.shape == (8, 8)
    # ink is dark: the corners are paper
    assert drawn[0, 0] == 255
    assert drawn.min() < 30


def test_the_pictures_of_scikit_image():
    source = ScikitImagePairs()
    for index in range(len(source)):
        pair = source.read(index)
        assert Image.open(io.BytesIO(pair.image)).size[0] > 200
    import sys

    assert "skimage" not in sys.modules


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="got no folders"):
        open_labelled(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="got no pictures"):
        open_labelled(tmp_path)
    with pytest.raises(FileNotFoundError, match="none is there"):
        open_labelled(tmp_path / "missing")


def test_captions_are_no_classes(tmp_path):
    small.write_pictures(tmp_path / "pairs" / "below", 2)
    assert not has_labels(str(tmp_path / "pairs"))
    assert not has_labels(str(tmp_path / "table.csv"))
